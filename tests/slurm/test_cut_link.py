"""The nodes' own network fails while Slurm's holds: network namespaces, with a cable between."""

import json
import os
import platform
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_dist.ends import HANG
from qlora_dist.layout import newest_attempt
from qlora_dist.train.compare import differences
from tests.slurm.conftest import RESOURCES, said, state, steps, wait_until

NODES = 2
TIMEOUT_S = 15
# The watch looks every fifth of the time-out, and killing and writing down takes a while.
NOTICED_S = TIMEOUT_S + 30
# Stands where a container's program would be started on a node, and enters the node's network.
SHIM = """#!/bin/bash
while [ "$1" != image ]; do shift; done
shift
exec ip netns exec {name}$SLURM_NODEID "$@"
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Cable:
    """Two nodes' networks, each with an address of its own, and what joins them."""

    def __init__(self, name):
        self.names = [f"{name}{node}" for node in range(NODES)]

    def lay(self):
        for number, name in enumerate(self.names):
            ip("netns", "add", name)
            # Every node finds the first one's address under the host's name.
            etc = Path("/etc/netns") / name
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n10.99.0.1 {platform.node()}\n")
            if number:
                ends = ("data", "netns", name, "type", "veth", "peer", "name", "data")
                ip("link", "add", *ends, "netns", self.names[0])
        for number, name in enumerate(self.names, 1):
            ip("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", "data")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "data", "up")

    def set(self, to):
        ip("-n", self.names[1], "link", "set", "data", to)

    def remove(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            (Path("/etc/netns") / name / "hosts").unlink(missing_ok=True)
            if (Path("/etc/netns") / name).exists():
                (Path("/etc/netns") / name).rmdir()


@pytest.fixture
def cable(tmp_path):
    cable = Cable(f"qlora-{os.getpid()}-")
    try:
        cable.lay()
    except (OSError, subprocess.CalledProcessError) as error:
        cable.remove()
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield cable
    cable.remove()


@pytest.mark.parametrize("stage", ["training", pytest.param("save", marks=pytest.mark.matrix)])
def test_a_run_whose_network_fails_ends_and_comes_back(cable, slurm, whole, tmp_path, stage):
    shim = tmp_path / "bin" / "apptainer"
    shim.parent.mkdir()
    shim.write_text(SHIM.format(name=cable.names[0][:-1]))
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    site = {
        "setup": [f"export PATH={shim.parent}:$PATH"],
        "container": {"kind": "apptainer", "image": "image", "python": sys.executable},
        "network_interface": "data",
        # The second save of the first attempt takes its time.
        "env": {"QLORA_FAULT": "save-write#2@1~0=slow:5"} if stage == "save" else {},
    }
    resources = {**RESOURCES, "timeout_s": TIMEOUT_S, "profile": str(tmp_path / "site.yaml")}
    run, _ = slurm(site=site, resources=resources)
    if stage == "save":
        wait_until(lambda: (run.checkpoints / "step_000040.partial").exists())
    else:
        wait_until(lambda: steps(run) >= 25)
    cable.set("down")
    cut = time.monotonic()
    wait_until(lambda: newest_attempt(run) == 1 or "code" in ended(run), timeout_s=NOTICED_S)
    print(f"ended {time.monotonic() - cut:.0f} s after the cut")
    cable.set("up")
    assert len(list((run.attempt(0) / "ranks").glob("*.json"))) == NODES
    wait_until(lambda: state(run) in ("done", "failed"))
    assert state(run) == "done", said(run)
    assert ended(run)["code"] == HANG
    assert f"nothing has moved for {TIMEOUT_S} s: " in ended(run)["cause"]
    assert differences(whole, run) == []


def ended(run):
    """How the first attempt ended; empty while it has not."""
    tree = json.loads((run.attempt(0) / "attempt.json").read_text())
    return tree.get("end") or {}
