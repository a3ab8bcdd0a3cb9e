"""How far a long stage is: a bar where there is a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from qlora_dist.console import LINE_EVERY_S


@dataclass(frozen=True)
class Ticker:
    """Shows stages, one after the other.

    Attributes:
        say: Takes each plain line.
        bar: Draw bars on standard error instead of saying lines.
    """

    say: Callable[[str], None]
    bar: bool = False

    @contextmanager
    def stage(self, text: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
        """Show a stage of ``total`` units; what is given is to be called once for each."""
        if self.bar:
            with tqdm(total=total, desc=text, unit=unit, dynamic_ncols=True) as bar:
                yield lambda: bar.update()
            return
        self.say(f"{text}: {total:,} {unit}s")
        count, last = 0, time.monotonic()

        def tick() -> None:
            nonlocal count, last
            count += 1
            if time.monotonic() - last >= LINE_EVERY_S:
                last = time.monotonic()
                self.say(f"{text}: {count:,} of {total:,} {unit}s")

        yield tick
