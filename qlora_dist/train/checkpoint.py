"""A run's state to and from a checkpoint folder: safetensors and JSON by parameter name.

::

    adapter.safetensors     trainable parameters
    optimizer.safetensors   moments
    rng/00000.safetensors   generators of each rank
    state.json              TrainState, the spec, and what PEFT needs to load the adapter
    manifest.json           sizes and hashes of the rest; see qlora_dist.checkpoints

Training waits for the copy into host memory; a thread of each rank writes it and the threads commit
it together, over a control group of their own.
"""

import importlib.metadata
import json
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from qlora_dist import __version__, checkpoints, faults
from qlora_dist.checkpoints import Checkpoint
from qlora_dist.errors import CheckpointError, QLoRAError
from qlora_dist.files import fsync_file, write_json
from qlora_dist.layout import RunDir
from qlora_dist.resume import check_change, spec_sha256
from qlora_dist.spec import RunSpec
from qlora_dist.spec_file import spec_from_tree
from qlora_dist.train.generators import get_rng, seed_rng, set_rng
from qlora_dist.train.log import Metrics
from qlora_dist.train.optimizer import moment_bytes, moments, set_moments
from qlora_dist.train.snapshot import ALIGNMENT, Snapshot
from qlora_dist.train.tensor_file import Entry, write_tensors
from qlora_dist.train.world import World

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
# A last save that failed is tried again this often, so many seconds apart.
_LAST_TRIES, _TRY_AGAIN_S = 3, 2.0
# How long a process that is about to fail waits for a save that is still being written.
_CLOSE_S = 60.0


@dataclass(frozen=True)
class TrainState:
    """Where a run stands between two steps; with weights, moments and generators, all of it.

    Attributes:
        step: Steps that are complete.
        position: Sequences that the run has consumed.
        tokens: Tokens of those sequences.
        evaluated_step: Step of the last evaluation; None before the first.
        best_step: Step with the lowest evaluation loss so far.
        best_loss: That loss, in nats a target token.
        metrics_bytes: Length of metrics.jsonl.
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    evaluated_step: int | None = None
    best_step: int | None = None
    best_loss: float | None = None
    metrics_bytes: int = 0

    @property
    def mark(self) -> tuple[int, int | None]:
        """Tells one state of a run from another, on every rank alike."""
        return self.step, self.evaluated_step


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
            traceback.print_exc()
            self.problem, self.bug = self.problem or str(error), error
        self.seconds = time.monotonic() - begin


class Checkpointer:
    """Saves and restores one process's part of a run.

    Args:
        run: The run directory.
        spec: Its spec.
        world: The processes.
        parameters: Trainable parameters by name, equal on all ranks.
        optimizer: Theirs.
        target_modules: Layers that the adapter is on, as PEFT names them.
        corpus_sha256: Of the corpus; a run goes on only with the one it began with.
        metrics: The run's; what a checkpoint counts of them is on the disk before it.
        say: Takes lines for a person.
    """

    def __init__(
        self,
        run: RunDir,
        spec: RunSpec,
        world: World,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Any,
        target_modules: list[str],
        corpus_sha256: str,
        metrics: Metrics,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._spec, self._world = run, spec, world
        self._parameters, self._optimizer = parameters, optimizer
        self._target_modules = target_modules
        self._corpus_sha256, self._metrics, self._say = corpus_sha256, metrics, say
        self._background = world.second()
        self._snapshot = Snapshot()
        self._save: _Save | None = None
        self._tried = self._committed = TrainState()
        self._retry_step, self._backoff = 0, 1

    def prepare(self) -> None:
        """Take the memory for copies before training, where nobody waits for it."""
        if self._world.rank != 0:
            return
        size = 0
        for parameter in self._parameters.values():
            size += parameter.nbytes + moment_bytes(self._spec.optimizer, parameter)
            # The parameter, and at most two moments with their constants.
            size += 5 * ALIGNMENT
        self._snapshot.reserve(size, page_locked=self._world.device.type == "cuda")

    def due(self, state: TrainState, *, improved: bool) -> bool:
        """Whether to save between these two steps; the same on every rank."""
        if state.step == 0 or state.mark == self._tried.mark:
            return False
        checkpoint = self._spec.checkpoint
        regular = state.step % checkpoint.every_steps == 0 or (improved and checkpoint.keep_best)
        failed = self._tried.step > self._committed.step
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
        tensors: dict[str, torch.Tensor] = {}
        if self._world.rank == 0:
            tensors = {f"{ADAPTER}:{name}": p for name, p in self._parameters.items()}
            own = moments(self._optimizer, self._parameters)
            tensors |= {f"{OPTIMIZER}:{name}": tensor for name, tensor in own.items()}
            tensors = self._snapshot.take(tensors)
        self._metrics.flush()
        state = replace(state, metrics_bytes=self._metrics.bytes)
        self._tried = state
        waited = time.monotonic() - begin
        self._save = _Save(state, waited, lambda save: self._write(save, tensors, rng))
        self._save.start()

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
            self._say(
                f"step {step}: checkpoint committed after {save.seconds:.1f} s; training waited "
                f"{save.waited_s:.2f} s"
            )
            return
        every = self._spec.checkpoint.every_steps
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

    def restore(self, checkpoint: Checkpoint) -> TrainState:
        """Put a checkpoint's state into the parameters, the optimizer and the generators.

        Raises:
            CheckpointError: It is not of this run, or does not fit the model.
            PlanError: The spec has changed in a key that may not.
        """
        path, manifest = checkpoint.path, checkpoint.manifest
        tree = json.loads((path / STATE).read_text(encoding="utf-8"))
        for line in check_change(spec_from_tree(tree["spec"], source=str(path)), self._spec):
            self._say(line)
        if manifest["corpus_sha256"] != self._corpus_sha256:
            sources = ", ".join(dataset.source for dataset in self._spec.data.datasets)
            raise CheckpointError(
                f"{path}: the data is not the one that the run began with (data.source: {sources});"
                " put it back, or start a new run"
            )
        self._say_changes(manifest)
        weights = load_file(path / ADAPTER)
        if set(weights) != set(self._parameters):
            odd = sorted(set(weights) ^ set(self._parameters))
            raise CheckpointError(f"{path}: does not fit the model: {', '.join(odd[:3])}")
        for name, parameter in self._parameters.items():
            parameter.data.copy_(weights[name])
        state = TrainState(**tree["train"])
        saved = load_file(path / OPTIMIZER)
        set_moments(self._spec.optimizer, self._optimizer, self._parameters, saved, step=state.step)
        self._restore_rng(checkpoint, state)
        self._tried = self._committed = state
        return state

    def _restore_rng(self, checkpoint: Checkpoint, state: TrainState) -> None:
        before, now = checkpoint.manifest["world_size"], self._world.size
        rng: dict[str, torch.Tensor] = {}
        if before == now:
            rng = load_file(_rng_file(checkpoint.path, self._world.rank))
        if rng and ("cuda" in rng) == (self._world.device.type == "cuda"):
            set_rng(rng, self._world.device)
            return
        seed_rng(self._spec.seed, self._world.rank, state.step)
        self._say(
            f"{now} processes go on where {before} stopped, or on another kind of device: their "
            "generators are seeded anew from seed, rank and step"
        )

    def _write(
        self, save: _Save, tensors: Mapping[str, torch.Tensor], rng: Mapping[str, torch.Tensor]
    ) -> None:
        """Runs in the save's thread."""
        folder, state = self._run.checkpoints, save.state
        partial = checkpoints.partial_path(folder, state.step)
        known: dict[str, str] = {}

        def begin() -> None:
            faults.reach("save-begin")
            checkpoints.begin(folder, state.step)

        def write() -> None:
            faults.reach("save-write")
            file = _rng_file(partial, self._world.rank)
            write_tensors(file, {name: Entry.of(tensor) for name, tensor in rng.items()})
            if self._world.rank == 0:
                known.update(self._write_state(partial, state, tensors))

        def commit() -> None:
            self._check_metrics(state)
            facts = self._facts()
            checkpoints.commit(partial, step=state.step, facts=facts, known=known)

        for stage, only_rank_0 in ((begin, True), (write, False), (commit, True)):
            save.problem = self._together(stage, partial, only_rank_0=only_rank_0)
            if save.problem:
                if self._world.rank == 0:
                    checkpoints.discard(partial)
                return
        if self._world.rank == 0:
            self._retain(state)
            faults.reach("save-after")

    def _check_metrics(self, state: TrainState) -> None:
        """A resume cuts metrics.jsonl back to the checkpoint; it must reach as far."""
        path = self._run.metrics
        if state.metrics_bytes > (path.stat().st_size if path.exists() else 0):
            raise CheckpointError(f"{path} lacks its last lines, which the disk refused")
        if path.exists():
            fsync_file(path)

    def _write_state(
        self, partial: Path, state: TrainState, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, str]:
        hashes = {}
        for file in (ADAPTER, OPTIMIZER):
            entries = {
                name.removeprefix(f"{file}:"): Entry.of(tensor)
                for name, tensor in tensors.items()
                if name.startswith(f"{file}:")
            }
            hashes[file] = write_tensors(partial / file, entries)
        tree = {
            "train": asdict(state),
            "target_modules": self._target_modules,
            "spec": self._spec.model_dump(mode="json"),
        }
        write_json(partial / STATE, tree)
        return hashes

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

    def _retain(self, state: TrainState) -> None:
        keep = self._spec.checkpoint
        try:
            checkpoints.retain(
                self._run.checkpoints,
                keep_last=keep.keep_last,
                keep_every=keep.keep_every,
                best_step=state.best_step if keep.keep_best else None,
            )
        except OSError as error:
            self._say(f"old checkpoints could not be removed: {error}")

    def _say_changes(self, manifest: Mapping[str, Any]) -> None:
        """A run goes on with other versions or GPUs, and is then no longer the same bits."""
        facts = self._facts()
        before = {"device": manifest["device"], **manifest["versions"]}
        for name, value in {"device": facts["device"], **facts["versions"]}.items():
            if before.get(name) != value:
                self._say(f"{name} was {before.get(name)} and is {value}: not bit for bit the same")

    def _facts(self) -> dict[str, Any]:
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        return {
            "spec_sha256": spec_sha256(self._spec),
            "corpus_sha256": self._corpus_sha256,
            "world_size": self._world.size,
            "device": _device_name(self._world.device),
            "versions": {"qlora-dist": __version__, **versions},
        }


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / "rng" / f"{rank:05d}.safetensors"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
