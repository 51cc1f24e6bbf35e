"""``moshi-ttt evaluate``: does memory help, on the same data, by the same code, with intervals.

``subjects`` loads the base model and adapters and says under which condition they are heard, ``documents`` reads the
recordings, ``statistics`` makes intervals, ``reporting`` writes the folder; each evaluation is a module of its own.
"""
