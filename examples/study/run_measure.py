"""``python examples/study/run_measure.py TASK``: measure one model; TASK is a ``measure.Task`` as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of a script, Python adds its own folder alone

from study.measure import Task, run

if __name__ == "__main__":
    run(Task(**json.loads(sys.argv[1])))
