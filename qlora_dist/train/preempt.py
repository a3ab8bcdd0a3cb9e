"""A stop request: set by a signal or by a file, agreed by all ranks, acted on between steps.

Imports no torch, so that the handlers stand before the seconds in which torch is imported.
"""

import os
import signal
import types
from pathlib import Path

from qlora_dist import ends
from qlora_dist.control import stop_code
from qlora_dist.process import STOP_SIGNALS, die_with_parent


class Preempted(Exception):
    """All ranks have agreed to save and end."""


class StopRequest:
    """Whether this process has been asked to stop.

    Attributes:
        file: Polled beside the flag: a signal may not reach every rank, and a file does.
    """

    def __init__(self) -> None:
        self.file: Path | None = None
        self._signalled = False

    def install(self) -> None:
        """Handle signals, and ask for one when torchrun ends without us."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        die_with_parent()

    def _on_signal(self, _number: int, _frame: types.FrameType | None) -> None:
        self._signalled = True

    @property
    def code(self) -> int:
        """The code to end with, once stopped."""
        return ends.PREEMPTED if self.file is None else stop_code(self.file)

    def here(self) -> bool:
        """Whether this process has seen a request; says nothing of the other ranks."""
        return self._signalled or (self.file is not None and os.path.exists(self.file))  # noqa: PTH110 - polled each micro-step
