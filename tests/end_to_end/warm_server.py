"""A process that has imported everything, and forks a run of the program for each line that it reads.

A run takes five seconds less than one that starts Python. Each line of stdin is a JSON object with ``arguments``, a
``folder``, the whole ``environment`` and ``seconds``, after which the run is killed; its answer is a line with the exit
status, null for a run that was killed. stdout and stderr of a run are ``FOLDER.out`` and ``FOLDER.err``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import warm


def main() -> None:
    """Serve until stdin ends."""
    warm.prepare()
    for line in sys.stdin:
        request = json.loads(line)
        process = warm.start(work_of(request), Path(request["folder"]))
        status = process.wait(request["seconds"])
        process.kill()
        print(json.dumps(status), flush=True)


def work_of(request: dict[str, Any]) -> Callable[[], int]:
    """Return the program with a request's arguments, in its environment."""
    work = warm.program("run", *request["arguments"])

    def in_environment() -> int:
        os.environ.clear()
        os.environ.update(request["environment"])
        return work()

    return in_environment


if __name__ == "__main__":
    main()
