"""``python -m qlora_dist.node RUN ATTEMPT HOST PORT``: one node's share of a job, under srun.

Starts torchrun and waits for it. Signals that Slurm sends to the whole step become the stop file,
which the ranks poll; torchrun is kept out of it, since it answers SIGTERM by killing whoever is
still saving half a minute later.
"""

import contextlib
import os
import signal
import sys
import types
from pathlib import Path

from qlora_dist.layout import RunDir
from qlora_dist.torchrun import start_torchrun

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
        # An option: torchrun sets TORCHELASTIC_SIGNALS_TO_HANDLE itself, to what this one says.
        "--signals-to-handle=SIGINT",
    )
    log = run.attempt(number) / "logs" / f"torchrun_{os.environ['SLURM_NODEID']}.log"
    process = start_torchrun(run, number, rendezvous, log, {})

    def on_signal(_number: int, _frame: types.FrameType | None) -> None:
        with contextlib.suppress(OSError):
            run.stop_file(number).touch(mode=0o600)

    for each in SIGNALS:
        signal.signal(each, on_signal)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
