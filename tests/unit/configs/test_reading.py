"""Reading a config, a training run's too, needs none of the code that trains or evaluates."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, sys, yaml
from moshi_ttt.configs.paths import packaged_configs
from moshi_ttt.configs.reading import RUN_KEY, read_config, read_speakers

runs = []
for name, path in packaged_configs().items():
    read_config(name), read_speakers(name)
    if RUN_KEY in yaml.safe_load(path.read_text(encoding="utf-8")):
        runs.append(name)
print(json.dumps({"runs": runs, "modules": sorted(sys.modules)}))
"""
UNWANTED = {"moshi_ttt.training", "moshi_ttt.evaluation", "moshi_ttt.data", "moshi_ttt.apps"}


def test_reading_any_config_imports_no_training_code():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen["runs"]) >= 2, "configs of training runs were among them"
    packages = {".".join(module.split(".")[:2]) for module in seen["modules"]}
    assert "moshi_ttt.configs" in packages
    assert packages & UNWANTED == set()
