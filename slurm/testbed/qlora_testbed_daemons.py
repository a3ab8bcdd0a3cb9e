"""The daemons of a testbed: started, written down, and ended by whoever reads what was written."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from qlora_dist.errors import QLoRAError
from qlora_dist.files import write_json
from qlora_dist.process import Process
from qlora_testbed_procs import process_of, send

# A daemon has this long to start, and as long to end. Each takes under 1 s on an idle machine.
_PATIENCE_S = 30.0
_LOG_LINES = 12


class Daemons:
    """Daemons by name, written to ``record`` as they start, in that order.

    Args:
        record: A JSON file; one that an earlier process left is read.
        logs: An existing folder, once one starts.
    """

    def __init__(self, record: Path, logs: Path) -> None:
        self._record = record
        self._logs = logs
        self._children: list[subprocess.Popen[bytes]] = []
        self._processes: dict[str, Process] = {}
        if record.exists():
            written = json.loads(record.read_text(encoding="utf-8"))
            self._processes = {name: Process(**process) for name, process in written.items()}

    def alive(self) -> tuple[str, ...]:
        """Names of those that run, the first started first."""
        return tuple(name for name, one in self._processes.items() if one.is_gone() is False)

    def start(self, name: str, argv: Sequence[str | Path], env: Mapping[str, str]) -> None:
        """Start one, unless it runs. What it prints goes to the end of its log.

        Raises:
            QLoRAError: It ended at once.
        """
        if name in self.alive():
            return
        with self._log(name).open("ab") as log:
            child = subprocess.Popen(
                argv,
                env=env,
                cwd=self._logs,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C on the terminal is not for the daemons.
                start_new_session=True,
            )
        self._children.append(child)
        process = process_of(child.pid)
        if process is None:
            raise QLoRAError(f"{name} ended; {self._log_end(name)}")
        self._processes.pop(name, None)
        self._processes[name] = process
        self._write()

    def wait_for(self, name: str, ready: Callable[[], bool]) -> None:
        """Wait until ``ready()``, which tells whether this daemon does its work.

        Raises:
            QLoRAError: It ended, or took too long; the message has the end of its log.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while not ready():
            if name not in self.alive():
                raise QLoRAError(f"{name} ended; {self._log_end(name)}")
            if time.monotonic() > deadline:
                raise QLoRAError(f"{name}: not up in {_PATIENCE_S:g} s; {self._log_end(name)}")
            time.sleep(0.05)

    def end(self, names: Sequence[str], *, number: signal.Signals = signal.SIGTERM) -> None:
        """End those of these that run, together, and come back when they have ended."""
        running = [self._processes[name] for name in names if name in self.alive()]
        for number_now in (number, signal.SIGKILL):
            for process in running:
                send(process, number_now)
            deadline = time.monotonic() + _PATIENCE_S
            while any(not one.is_gone() for one in running) and time.monotonic() < deadline:
                time.sleep(0.02)
        # Else those of this process's daemons that have ended would stay as zombies.
        self._children = [child for child in self._children if child.poll() is None]

    def _write(self) -> None:
        write_json(self._record, {name: asdict(one) for name, one in self._processes.items()})

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _log_end(self, name: str) -> str:
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n  ".join([f"the end of {self._log(name)}:", *lines[-_LOG_LINES:]])
