"""The TTT layer that ``ttt_linear``, ``ttt_mlp`` and ``ttt_multilayer`` share. A library: it registers nothing."""
