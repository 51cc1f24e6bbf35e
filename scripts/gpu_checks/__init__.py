"""The sections of ``scripts/gpu_check.py``: correctness first (blocks, generation, training), then speed."""
