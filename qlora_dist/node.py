"""``python -m qlora_dist.node RUN ATTEMPT HOST PORT``: one node's share of a job, under srun.

Starts torchrun and waits for it. Signals that Slurm sends to the whole step become the stop file,
which the ranks poll; torchrun is kept out of it, since it answers SIGTERM by killing whoever is
still saving half a minute later.
"""

import contextlib
import json
import os
import signal
import sys
import types
from pathlib import Path

from qlora_dist.layout import RunDir
from qlora_dist.torchrun import note_env, process_env, start_torchrun

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(run_path: str, attempt: str, host: str, port: str) -> int:
    """Run torchrun on this node; returns its exit code."""
    run, number = RunDir(Path(run_path)), int(attempt)
    # Ignored signals stay ignored in what is started; the ranks set handlers of their own.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    rendezvous = (
        f"--nnodes={os.environ['SLURM_STEP_NUM_NODES']}",
        f"--node-rank={os.environ['SLURM_NODEID']}",
        f"--master-addr={host}",
        f"--master-port={port}",
    )
    log = run.attempt(number) / "logs" / f"torchrun_{os.environ['SLURM_NODEID']}.log"
    # Whether the code is the run's own is left to the ranks, whose ends the batch process hears of.
    env = process_env(run, number, os.environ, {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGINT"})
    if os.environ["SLURM_NODEID"] == "0":
        note_env(run, number, os.environ, env, left_out=_not_submitted(run))
    process = start_torchrun(run, rendezvous, log, env)

    def on_signal(_number: int, _frame: types.FrameType | None) -> None:
        with contextlib.suppress(OSError):
            run.stop_file(number).touch(mode=0o600)

    for each in SIGNALS:
        signal.signal(each, on_signal)
    return process.wait()


def _not_submitted(run: RunDir) -> list[str]:
    """Names of variables that sbatch has not passed on."""
    try:
        tree = json.loads(run.submitted_json.read_text(encoding="utf-8"))
    except OSError:
        return []
    return [str(name) for name in tree["left_out"]]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
