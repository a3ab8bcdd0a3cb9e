"""``python -m qlora_dist.node RUN ATTEMPT HOST PORT``: one node's share of a job, under srun.

Checks the node, starts torchrun and stays with it. Signals that Slurm sends to the whole step
become the stop file, which the ranks poll; torchrun is kept out of it, since it answers SIGTERM by
killing whoever is still saving half a minute later.
"""

import json
import os
import signal
import sys
import types
from pathlib import Path

from qlora_dist.control import ask_to_stop
from qlora_dist.ends import write_rank_end
from qlora_dist.errors import BadNodeError
from qlora_dist.layout import RunDir
from qlora_dist.node_check import check_node
from qlora_dist.process_env import note_env, process_env
from qlora_dist.torchrun import attend, start_torchrun

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(run_path: str, attempt: str, host: str, port: str) -> int:
    """Run torchrun on this node; returns its exit code."""
    run, number = RunDir(Path(run_path)), int(attempt)
    # Ignored signals stay ignored in what is started; the ranks set handlers of their own.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    node, name = int(os.environ["SLURM_NODEID"]), os.environ["SLURMD_NODENAME"]
    num_nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
    world_size = json.loads(run.command_json.read_text(encoding="utf-8"))["world_size"]
    per_node = world_size // num_nodes
    ranks = range(node * per_node, (node + 1) * per_node)
    try:
        check_node(run, name)
    except BadNodeError as error:
        sys.stderr.write(f"{error}\n")
        for rank in ranks:
            path, code = run.rank_file(number, rank), error.exit_code
            write_rank_end(path, rank=rank, code=code, cause=str(error), step=0, node=name)
        return error.exit_code
    rendezvous = (
        f"--nnodes={num_nodes}",
        f"--node-rank={node}",
        f"--master-addr={host}",
        f"--master-port={port}",
        # Slurm's SIGTERM reaches torchrun too, which would end the ranks half a minute later.
        "--signals-to-handle=SIGINT",
    )
    log = run.attempt(number) / "logs" / f"torchrun_{node}.log"
    # Whether the code is the run's own is left to the ranks, whose ends the batch process hears of.
    env = process_env(run, number, os.environ)
    if node == 0:
        note_env(run, number, os.environ, env, left_out=_not_submitted(run))
    process = start_torchrun(run, rendezvous, log, env)

    def on_signal(_number: int, _frame: types.FrameType | None) -> None:
        ask_to_stop(run, number)

    for each in SIGNALS:
        signal.signal(each, on_signal)
    return attend(process, run, number, ranks, node=name)


def _not_submitted(run: RunDir) -> list[str]:
    """Names of variables that sbatch has not passed on."""
    try:
        tree = json.loads(run.submitted_json.read_text(encoding="utf-8"))
    except OSError:
        return []
    return [str(name) for name in tree["left_out"]]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
