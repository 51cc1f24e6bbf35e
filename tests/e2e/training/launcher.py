"""torchrun as it is, and a record of its ranks: their process ids when they start, their exit codes when they end.

torchrun itself ends with 0 or 1, whatever its ranks ended with. ``python launcher.py RECORD ARGUMENT...``
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.run import main


class Recorded(subprocess.Popen):  # type: ignore[type-arg]
    """A process that is listed in ``ranks``."""

    ranks: ClassVar[list[Recorded]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ranks.append(self)
        write("started", [rank.pid for rank in self.ranks])


def write(name: str, value: Any) -> None:
    path = Path(sys.argv[1])
    temporary = path.with_suffix(".tmp")
    record = json.loads(path.read_text()) if path.exists() else {}
    temporary.write_text(json.dumps({**record, name: value}))
    temporary.rename(path)


if __name__ == "__main__":
    subprocess_handler.Popen = Recorded
    try:
        main(sys.argv[2:])
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        write("ended", [rank.wait(timeout=60) for rank in Recorded.ranks])
