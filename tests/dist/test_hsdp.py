"""hsdp: two nodes of two processes each, every node started by a torchrun of its own."""

import os
import socket
import subprocess
import sys

import pytest

from qlora_dist.layout import RunDir
from qlora_dist.process import be_killed_with_parent
from qlora_dist.train.compare import differences
from tests.dist.test_full import FULL, single, tied_model, unlike  # noqa: F401 - fixtures

RESOURCES = {
    "backend": "slurm",
    "nodes": 2,
    "gpus_per_node": 0,
    "processes_per_node": 2,
    "cpus_per_process": 1,
    "time": "0:10:00",
}


class Nodes:
    """Both nodes of a run."""

    def __init__(self, run):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.run = run
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
                    *("--nproc-per-node=2", f"--node-rank={node}", "--master-addr=127.0.0.1"),
                    *(f"--master-port={port}", "-m", "qlora_dist.train.worker", run.root),
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=be_killed_with_parent,
            )
            for node in range(2)
        ]

    def finish(self):
        """Wait for both; their codes, and what they said."""
        said = [process.communicate(timeout=200)[0] for process in self.processes]
        return [process.returncode for process in self.processes], "\n".join(said)


@pytest.fixture
def start(config, qlora):
    """Prepare a run of two nodes, or take one that is there, and start it."""
    started = []

    def go(run, **changes):
        if not isinstance(run, RunDir):
            path = config(run, **{"resources": RESOURCES, **changes})
            qlora("run", path, "--prepare")
            run = RunDir(path.with_suffix(""))
        started.append(Nodes(run))
        return started[-1]

    yield go
    for nodes in started:
        for process in nodes.processes:
            process.kill()
            process.wait()


def test_a_run_is_ddps_bit_for_bit(start):
    runs = []
    for kind in ("ddp", "hsdp"):
        nodes = start(kind, strategy__kind=kind)
        codes, said = nodes.finish()
        assert codes == [0, 0], said
        runs.append(nodes.run)
    assert differences(*runs) == []
    # The nodes have the same moments, of which one saves its processes' halves.
    files = {path.name for path in runs[1].checkpoints.glob("*/optimizer/*")}
    assert files == {"00000.safetensors", "00001.safetensors"}


def test_weights_in_rows_are_summed_over_the_nodes(start, single, tied_model):  # noqa: F811
    """Full fine-tuning."""
    changes = {**FULL, "model__source": str(tied_model), "strategy__kind": "hsdp"}
    nodes = start("full", **changes)
    codes, said = nodes.finish()
    assert codes == [0, 0], said
    assert unlike(nodes.run, single, loss=1e-6) == []
    files = {path.name for path in nodes.run.checkpoints.glob("*/weights/*")}
    assert files == {"00000.safetensors", "00001.safetensors"}
