"""Saving a run while it trains.

Training waits only for the copy into host memory. A thread of each rank writes it, and the threads
commit it together, over a control group of their own.
"""

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from qlora_dist import checkpoints, faults
from qlora_dist.checkpoints import Written
from qlora_dist.errors import CheckpointError, QLoRAError
from qlora_dist.files import SEEN_WITHIN_S, fsync_file, sha256_file, wait_for, write_json
from qlora_dist.layout import newest_attempt
from qlora_dist.train.checkpoint import (
    STATE,
    Part,
    TrainState,
    moments_name,
    rng_name,
    weights_name,
)
from qlora_dist.train.generators import get_rng
from qlora_dist.train.log import Metrics
from qlora_dist.train.optimizer import moment_bytes
from qlora_dist.train.snapshot import ALIGNMENT, Snapshot
from qlora_dist.train.tensor_file import Entry, write_tensors

# A last save that failed is tried again this often, so many seconds apart.
_LAST_TRIES, _TRY_AGAIN_S = 3, 2.0
# How long a process that is about to fail waits for a save that is still being written.
_CLOSE_S = 60.0


class _Save(threading.Thread):
    """One save on its way to the disk.

    Attributes:
        waited_s: How long training waited for the copy.
        seconds: How long the writing took.
        problem: Why it failed, on whichever rank; empty if it was committed.
        bug: An exception of this rank that no storage causes.
    """

    def __init__(
        self, state: TrainState, waited_s: float, write: Callable[["_Save"], None]
    ) -> None:
        super().__init__(name=f"save-{state.step}", daemon=True)
        self.state, self.waited_s, self._write = state, waited_s, write
        self.problem, self.seconds = "", 0.0
        self.bug: Exception | None = None

    def run(self) -> None:
        """Write, and keep what went wrong for the training thread."""
        begin = time.monotonic()
        try:
            self._write(self)
        except Exception as error:
            self.problem, self.bug = self.problem or repr(error), error
            # Standard error may be a file on the disk that is full.
            with contextlib.suppress(OSError):
                traceback.print_exc()
        self.seconds = time.monotonic() - begin


class Saver:
    """Saves one process's part of a run.

    Args:
        part: What is saved.
        metrics: The run's; what a checkpoint counts of them is on the disk before it.
        committed: The state that the run begins with, which needs no saving.
    """

    def __init__(self, part: Part, metrics: Metrics, committed: TrainState) -> None:
        self._part, self._metrics = part, metrics
        self._world, self._say = part.world, part.say
        self._background = part.world.second()
        self._snapshot = Snapshot()
        self._save: _Save | None = None
        self._tried = self._committed = committed
        self._kept_best = committed.best_step
        self._retry_step, self._backoff = 0, 1

    def prepare(self) -> None:
        """Take the memory for copies before training, where nobody waits for it."""
        trained = self._part.trained
        size = sum(tensor.nbytes + ALIGNMENT for tensor in trained.saved.values())
        if trained.saves_moments:
            for parameter in trained.stepped.values():
                # At most two moments with their constants.
                size += moment_bytes(self._part.spec.optimizer, parameter) + 4 * ALIGNMENT
        self._snapshot.reserve(size, page_locked=self._world.device.type == "cuda")

    def due(self, state: TrainState, *, improved: bool) -> bool:
        """Whether to save between these two steps; the same on every rank."""
        if state.step == 0 or state.mark == self._tried.mark:
            return False
        checkpoint = self._part.spec.checkpoint
        regular = state.step % checkpoint.every_steps == 0 or (improved and checkpoint.keep_best)
        failed = self._save is None and self._tried.step > self._committed.step
        return regular or (failed and state.step >= self._retry_step)

    def start(self, state: TrainState) -> None:
        """Copy the state, and have it written while training goes on; all ranks together.

        A save that is still being written is waited for.

        Raises:
            Exception: A mistake in the code that wrote the last one.
        """
        self.poll(wait=True)
        begin = time.monotonic()
        rng = get_rng(self._world.device)
        tensors = self._snapshot.take(self._tensors())
        self._metrics.flush()
        state = replace(state, metrics_bytes=self._metrics.bytes)
        self._tried = state
        waited = time.monotonic() - begin
        self._save = _Save(state, waited, lambda save: self._write(save, tensors, rng))
        self._save.start()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What this process writes, as ``FILE:TENSOR``; the tensors themselves."""
        trained = self._part.trained
        file = weights_name(self._world.rank)
        found = {f"{file}:{name}": tensor for name, tensor in trained.saved.items()}
        if trained.saves_moments:
            file = moments_name(self._world.rank)
            found |= {f"{file}:{name}": tensor for name, tensor in trained.moments().items()}
        return found

    def poll(self, *, wait: bool = False) -> None:
        """See whether the save that was started has ended, on all ranks; say so if it has."""
        save = self._save
        if save is None:
            return
        if wait:
            save.join()
        elif self._world.any(save.is_alive()):
            return
        self._save = None
        if save.bug is not None:
            raise save.bug
        step = save.state.step
        if not save.problem:
            self._committed, self._backoff = save.state, 1
            self._world.pulse.took(save_s=save.waited_s + save.seconds)
            self._say(
                f"step {step}: checkpoint committed after {save.seconds:.1f} s; training waited "
                f"{save.waited_s:.2f} s"
            )
            return
        every = self._part.spec.checkpoint.every_steps
        self._retry_step = self._tried.step + self._backoff
        self._backoff = min(2 * self._backoff, every)
        self._say(
            f"step {step}: NOT saved: {save.problem}; training goes on, the last checkpoint is of "
            f"step {self._committed.step}"
        )

    def finish(self, state: TrainState) -> None:
        """Have a state committed before anything else happens; all ranks together.

        Raises:
            CheckpointError: It could not be written. Earlier checkpoints are untouched.
        """
        self.poll(wait=True)
        for left in reversed(range(_LAST_TRIES)):
            if self._committed.mark == state.mark:
                return
            self.start(state)
            save = self._save
            self.poll(wait=True)
            if left and self._committed.mark != state.mark:
                time.sleep(_TRY_AGAIN_S)
        if self._committed.mark != state.mark:
            assert save is not None
            raise CheckpointError(save.problem)

    def close(self) -> None:
        """Let a save end that is still being written, for a process that is about to fail."""
        if self._save is not None:
            self._save.join(_CLOSE_S)

    def _write(
        self, save: _Save, tensors: Mapping[str, torch.Tensor], rng: Mapping[str, torch.Tensor]
    ) -> None:
        """Runs in the save's thread."""
        folder, state = self._part.run.checkpoints, save.state
        partial = checkpoints.partial_path(folder, state.step)
        files: dict[str, Written] = {}

        def begin() -> None:
            faults.reach("save-begin")
            checkpoints.begin(folder, state.step)

        def write() -> None:
            wait_for(partial / checkpoints.FOLDERS[-1], SEEN_WITHIN_S)
            faults.reach("save-write")
            name = rng_name(self._world.rank)
            files[name] = _write_tensors(partial / name, rng)
            own = self._by_file(tensors)
            files.update({name: _write_tensors(partial / name, own[name]) for name in own})
            if self._world.rank == 0:
                files.update(self._write_state(partial, state))

        def commit() -> None:
            self._check_metrics(state)
            self._check_attempt()
            facts = self._part.facts()
            checkpoints.commit(partial, step=state.step, facts=facts, files=files)

        for stage, only_rank_0 in ((begin, True), (write, False), (commit, True)):
            save.problem = self._together(stage, partial, only_rank_0=only_rank_0)
            if save.problem:
                break
            if stage is write:
                files |= self._files_of_all(files)
        if self._world.rank == 0:
            self._tidy(save, partial)

    def _files_of_all(self, files: Mapping[str, Written]) -> dict[str, Written]:
        """What every rank has written."""
        mine = {name: asdict(file) for name, file in files.items()}
        everyone = self._background.gather_json(mine)
        return {name: Written(**file) for theirs in everyone for name, file in theirs.items()}

    def _tidy(self, save: _Save, partial: Path) -> None:
        """Remove what a failed save left, or what a good one makes superfluous."""
        if save.problem:
            checkpoints.discard(partial)
            return
        self._retain(save.state)
        faults.reach("save-after")

    def _check_metrics(self, state: TrainState) -> None:
        """A resume cuts metrics.jsonl back to the checkpoint; it must reach as far."""
        path = self._part.run.metrics
        if state.metrics_bytes > (path.stat().st_size if path.exists() else 0):
            raise CheckpointError(f"{path} lacks its last lines, which the disk refused")
        if path.exists():
            fsync_file(path)

    def _check_attempt(self) -> None:
        """Nothing is committed under the eyes of a newer attempt, which may have read the folder.

        Slurm starts one when it cannot reach a node; what runs there may reach the storage.
        """
        newest = newest_attempt(self._part.run)
        if newest is not None and newest > self._part.attempt:
            raise CheckpointError(f"attempt {newest} has begun: this one is over")

    def _by_file(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors by file; a file of moments is there before the first of them is."""
        trained = self._part.trained
        mine = [weights_name(self._world.rank)] * bool(trained.saved)
        mine += [moments_name(self._world.rank)] * trained.saves_moments
        found: dict[str, dict[str, torch.Tensor]] = {file: {} for file in mine}
        for name, tensor in tensors.items():
            file, _, own = name.partition(":")
            found[file][own] = tensor
        return found

    def _write_state(self, partial: Path, state: TrainState) -> dict[str, Written]:
        tree = {
            "train": asdict(state),
            "target_modules": self._part.target_modules,
            "shapes": {name: held.shape for name, held in self._part.trained.held.items()},
            "spec": self._part.spec.model_dump(mode="json"),
        }
        write_json(partial / STATE, tree)
        size, sha256 = (partial / STATE).stat().st_size, sha256_file(partial / STATE)
        return {STATE: Written(size, sha256)}

    def _together(self, stage: Callable[[], None], partial: Path, *, only_rank_0: bool) -> str:
        """Do a stage, and fail on all ranks if it fails on one; returns why."""
        problem, bug = "", None
        if self._world.rank == 0 or not only_rank_0:
            try:
                stage()
            except OSError as error:
                problem = checkpoints.storage_message(error, partial)
            except QLoRAError as error:
                problem = str(error)
            except Exception as error:
                problem, bug = f"rank {self._world.rank}: {error}", error
        problem = self._background.first_text(problem)
        if bug is not None:
            raise bug
        return problem

    def _best_steps(self, state: TrainState) -> set[int | None]:
        """The best step, and the one before if the best's own save failed."""
        best = state.best_step
        if best and checkpoints.final_path(self._part.run.checkpoints, best).exists():
            self._kept_best = best
        return {best, self._kept_best}

    def _retain(self, state: TrainState) -> None:
        keep = self._part.spec.checkpoint
        try:
            checkpoints.retain(
                self._part.run.checkpoints,
                keep_last=keep.keep_last,
                keep_every=keep.keep_every,
                best_steps=self._best_steps(state) if keep.keep_best else set(),
            )
        except OSError as error:
            self._say(f"old checkpoints could not be removed: {error}")


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Written:
    sha256 = write_tensors(path, {name: Entry.of(tensor) for name, tensor in tensors.items()})
    return Written(path.stat().st_size, sha256)
