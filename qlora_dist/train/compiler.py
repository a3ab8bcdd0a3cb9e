"""Whether Triton can work here: it needs a C compiler, for the code that starts a kernel."""

import functools
import importlib.util
import os
import shutil


@functools.cache
def can_compile() -> bool:
    """Whether Triton is there, and a compiler where Triton looks for one (3.6: CC, gcc, clang)."""
    there = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(there) and importlib.util.find_spec("triton") is not None
