"""Progress of downloads, and sizes as text."""

import io
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm import tqdm

from qlora_dist.console import LINE_EVERY_S

# In the place of a class of bars that huggingface_hub draws, where none is wanted.
NO_BAR: Any = partial(tqdm, disable=True)


def size_text(num_bytes: int) -> str:
    """A size in the unit that suits it, such as 13.48 GB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"


class DownloadProgress:
    """How far a download is: one bar on a terminal, a line now and then elsewhere.

    Args:
        total: Bytes of all files.
        say: Takes the lines.
        bar: Draw a bar on standard error instead.
    """

    def __init__(self, total: int, say: Callable[[str], None], *, bar: bool) -> None:
        self._total, self._say = total, say
        self._bar = (
            tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True) if bar else None
        )
        self._said = time.monotonic()

    def __enter__(self) -> "DownloadProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int) -> None:
        """Show how many bytes are there."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            self._say(f"{size_text(done)} of {size_text(self._total)}")

    def bar_class(self) -> Any:
        """A class of bars for huggingface_hub, which draw nothing and tell this one."""
        update = self.update

        class Told(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options | {"file": io.StringIO()})

            def display(self, *_args: Any, **_options: Any) -> None:
                # One bar counts bytes received, one bytes written, and one files.
                if self.unit == "B" and "Reconstruct" in self.desc:
                    update(self.n)

        return Told
