"""What ``benchmarks/run.py`` runs: comparisons of forms of one computation, each behind a correctness gate."""
