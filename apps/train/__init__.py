"""``moshi-ttt train``: fine-tuning Moshi with TTT blocks, LoRA, or everything, sharded over any number of ranks.

From the outside in: ``settings`` reads the file, ``run`` does everything in order, ``model`` builds and shards,
``data`` brings tokens, ``trainer`` makes one optimizer step, ``checkpoint`` saves and resumes, ``export`` writes what
others use, ``logs`` tells the world.
"""
