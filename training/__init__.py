"""Fine-tuning Moshi with TTT blocks, LoRA, or everything, sharded over any number of ranks.

From the outside in: ``run`` does everything in order, ``model`` builds and shards, ``moshi_ttt.data`` brings tokens,
``trainer`` makes one optimizer step, ``loop`` makes all of them, ``checkpoint`` saves and resumes, ``export`` writes
what others use, ``logs`` records what happens. The options are in ``moshi_ttt.configs.training``.
"""
