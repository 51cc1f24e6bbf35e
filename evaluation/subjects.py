"""Moved to ``moshi_ttt.evaluation.models``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.evaluation.subjects",
    "moshi_ttt.evaluation.models",
    {"Subject": "ModelUnderTest", "load_subjects": "load_models", "listen": "evaluate_codes"},
)
