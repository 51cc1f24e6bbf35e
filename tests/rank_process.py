"""One rank of ``ranks.launch``, which runs this file with a global ``JOB``.

It becomes the process that ``python ARGUMENTS...`` would be, and what it says goes to a file.
"""

from __future__ import annotations

import os
import runpy
import sys

job = globals()["JOB"]  # environment, arguments, said
file = os.open(job["said"], os.O_WRONLY | os.O_CREAT, 0o600)
os.dup2(file, 1)
os.dup2(file, 2)
os.environ.clear()
os.environ.update(job["environment"])
program, *_ = sys.argv = job["arguments"]
sys.path.insert(0, os.path.dirname(program))
runpy.run_path(program, run_name="__main__")
