"""``python -m qlora_dist.train.worker RUN``: one process of a run, to its end.

This file is what surrounds training: signals, logs, and a file that says how the process ended.
The stages themselves are in ``qlora_dist.train.stages``.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path

from qlora_dist import ends, faults
from qlora_dist.checkpoints import storage_message
from qlora_dist.code_tree import check_code
from qlora_dist.errors import QLoRAError
from qlora_dist.layout import RunDir
from qlora_dist.process import leave
from qlora_dist.ranks import register_rank
from qlora_dist.train.place import Place
from qlora_dist.train.preempt import Preempted, StopRequest
from qlora_dist.train.pulse import Pulse
from qlora_dist.train.stopwatch import Stopwatch


def main(run_path: str) -> int:
    """Train, and say how it ended; returns the process's exit code."""
    clock = Stopwatch()
    # Before torch is imported: that takes seconds, in which a signal would end the process.
    stop = StopRequest()
    stop.install()
    # Read once by cuBLAS, and then needed for deterministic runs under any launcher.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Nothing here is compiled by it, and bitsandbytes, which asks for it at its import, would have
    # every process spend two seconds on importing the compiler.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    place = Place.from_env()
    run = RunDir(Path(run_path).absolute())
    faults.arm(place.fault, rank=place.rank, attempt=place.attempt or 0, disk=run.root)
    pulse = Pulse()
    if place.attempt is not None:
        from qlora_dist.train.log import redirect_output

        redirect_output(run.rank_log(place.attempt, place.rank))
        register_rank(run.rank_file(place.attempt, place.rank))
        stop.file = run.stop_file(place.attempt)
        try:
            check_code(run)
        except QLoRAError as error:
            _complain(f"{error}\n")
            _say_end(run, place.attempt, place, error.exit_code, str(error), step=0)
            return error.exit_code
        pulse.start(run.beats(place.attempt) / f"{place.rank:05d}.json")

    from qlora_dist.train.stages import Progress, train

    clock.lap("imports")
    progress = Progress(place.attempt)
    code, cause = ends.DONE, "trained to the last step"
    try:
        faults.reach("start")
        train(run, place, stop, progress, clock, pulse)
    except Preempted:
        code, cause = stop.code, f"stopped after step {progress.step}"
    except QLoRAError as error:
        code, cause = error.exit_code, str(error)
        _complain(f"{cause}\n")
    except OSError as error:
        _complain(traceback.format_exc())
        code, cause = ends.FAILED, storage_message(error, run.root)
    except Exception as error:
        _complain(traceback.format_exc())
        code, cause = ends.FAILED, f"{type(error).__name__}: {error}"
    if progress.attempt is not None:
        _say_end(run, progress.attempt, place, code, cause, step=progress.step)
    if place.attempt is None:
        return code
    # For the other ends torchrun must end the other ranks.
    return 0 if code in ends.AGREED else code


def _say_end(run: RunDir, attempt: int, place: Place, code: int, cause: str, *, step: int) -> None:
    path, rank, node = run.rank_file(attempt, place.rank), place.rank, place.node
    try:
        ends.write_rank_end(path, rank=rank, code=code, cause=cause, step=step, node=node)
    except OSError as error:
        _complain(f"{storage_message(error, path)}\n")


def _complain(text: str) -> None:
    """Write to standard error, which may be a file on a disk that is full."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


if __name__ == "__main__":
    leave(main(sys.argv[1]))
