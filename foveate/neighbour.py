"""A competing process that can be started and stopped, to see what a deadline is worth."""

from __future__ import annotations

import subprocess
import sys

from stream.closing import Closing

BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100000))"


class Neighbour(Closing):
    """Processes that keep cores busy while switched on; all are gone when it is closed.

    A process also ends by itself when this one dies.
    """

    def __init__(self, processes: int = 1) -> None:
        self._count = processes
        self._running: list[subprocess.Popen[bytes]] = []

    @property
    def on(self) -> bool:
        return bool(self._running)

    def switch(self, on: bool) -> None:
        if on and not self._running:
            command = [sys.executable, "-c", BUSY]
            self._running = [subprocess.Popen(command) for _ in range(self._count)]
        elif not on:
            for process in self._running:
                process.kill()
            for process in self._running:
                process.wait()
            self._running = []

    def close(self) -> None:
        self.switch(False)
