"""Evaluations of the base model and of adapters on the same recordings, with intervals.

``models`` loads the base model and adapters and evaluates them under a condition, ``documents`` reads the recordings,
``clips`` puts clips of them into batches, ``teacher_forcing`` measures losses frame by frame, ``statistics`` makes
intervals, ``reporting`` writes the folder; each evaluation is a module of its own, and ``compare`` puts several in one
table.
"""
