"""Does memory help? The base model and adapters on the same recordings, by the same code, with intervals.

``models`` loads the base model and adapters and evaluates them under a condition, ``documents`` reads
the recordings, ``teacher_forcing`` measures losses frame by frame, ``statistics`` makes intervals, ``reporting`` writes
the folder; each evaluation is a module of its own, and ``compare`` puts several in one table.
"""
