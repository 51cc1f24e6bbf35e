"""The commands of ``moshi-ttt``, one module each. Nothing heavy is imported until a command runs."""
