"""The commands of ``moshi-ttt``, a module each. Nothing heavy is imported until one runs."""
