"""How a process of a process group ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_dist.process import leave

# What the interpreter's own end would wait for, or run.
SCRIPT = f"""
import atexit, sys, threading, time
from {leave.__module__} import leave
threading.Thread(target=time.sleep, args=(60,)).start()
atexit.register(print, "the interpreter's own end")
print("out")
print("err", end="", file=sys.stderr)
leave(7)
"""


def run(stdout):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        check=False,
    )


def test_a_process_leaves_at_once_with_what_it_printed():
    begin = time.monotonic()
    done = run(subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err")
    assert time.monotonic() - begin < 30


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_change_how_a_process_ended():
    with Path("/dev/full").open("w") as full:
        done = run(full)
    assert (done.returncode, done.stderr) == (7, b"err")
