"""A run's state to and from a checkpoint folder: safetensors and JSON by parameter name.

::

    adapter.safetensors     trainable parameters
    optimizer.safetensors   moments
    rng/00000.safetensors   generators of each rank
    state.json              TrainState, and what PEFT needs to load the adapter
    manifest.json           sizes and hashes of the rest; see qlora_dist.checkpoints
"""

import importlib.metadata
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_dist import __version__, checkpoints
from qlora_dist.checkpoints import Checkpoint
from qlora_dist.errors import CheckpointError
from qlora_dist.files import write_json
from qlora_dist.layout import RunDir
from qlora_dist.spec import RunSpec
from qlora_dist.train.optimizer import get_moments, set_moments
from qlora_dist.train.world import World

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class TrainState:
    """Where a run stands between two steps; with weights, moments and generators, all of it.

    Attributes:
        step: Steps that are complete.
        position: Samples that the run has consumed.
        tokens: Tokens of those samples.
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
        say: Callable[[str], None],
    ) -> None:
        self._run, self._spec, self._world = run, spec, world
        self._parameters, self._optimizer = parameters, optimizer
        self._target_modules = target_modules
        self._corpus_sha256, self._say = corpus_sha256, say

    def save(self, state: TrainState) -> None:
        """Write and commit a checkpoint; all ranks call this together.

        Raises:
            CheckpointError: Some rank could not write. Earlier checkpoints are untouched, and
                nothing of this one is left.
        """
        folder, step = self._run.checkpoints, state.step
        partial = checkpoints.partial_path(folder, step)
        self._together(partial, lambda: checkpoints.begin(folder, step), only_rank_0=True)
        self._together(partial, lambda: self._write(partial, state))
        self._together(
            partial,
            lambda: checkpoints.commit(partial, step=step, facts=self._facts()),
            only_rank_0=True,
        )
        if self._world.rank == 0:
            keep_best = state.best_step if self._spec.checkpoint.keep_best else None
            try:
                checkpoints.retain(
                    folder, keep_last=self._spec.checkpoint.keep_last, best_step=keep_best
                )
            except OSError as error:
                self._say(f"old checkpoints could not be removed: {error}")

    def restore(self, checkpoint: Checkpoint) -> TrainState:
        """Put a checkpoint's state into the parameters, the optimizer and the generators.

        Raises:
            CheckpointError: It is not of this run, or does not fit the model.
        """
        path, manifest = checkpoint.path, checkpoint.manifest
        if manifest["spec_sha256"] != self._spec.sha256():
            raise CheckpointError(f"{path}: was made by another spec")
        if manifest["corpus_sha256"] != self._corpus_sha256:
            raise CheckpointError(
                f"{path}: the data is not the one that the run began with (data.source: "
                f"{self._spec.data.source}); put it back, or start a new run"
            )
        self._say_changes(manifest)
        weights = load_file(path / ADAPTER)
        if set(weights) != set(self._parameters):
            odd = sorted(set(weights) ^ set(self._parameters))
            raise CheckpointError(f"{path}: does not fit the model: {', '.join(odd[:3])}")
        for name, parameter in self._parameters.items():
            parameter.data.copy_(weights[name])
        tree = json.loads((path / STATE).read_text(encoding="utf-8"))
        state = TrainState(**tree["train"])
        moments = load_file(path / OPTIMIZER)
        set_moments(
            self._spec.optimizer, self._optimizer, self._parameters, moments, step=state.step
        )
        set_rng(load_file(_rng_file(path, self._world.rank)), self._world.device)
        return state

    def _write(self, partial: Path, state: TrainState) -> None:
        rng = get_rng(self._world.device)
        save_file(rng, _rng_file(partial, self._world.rank))
        if self._world.rank != 0:
            return
        weights = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self._parameters.items()
        }
        save_file(weights, partial / ADAPTER)
        moments = get_moments(self._spec.optimizer, self._optimizer, self._parameters)
        save_file(moments, partial / OPTIMIZER)
        write_json(
            partial / STATE, {"train": asdict(state), "target_modules": self._target_modules}
        )

    def _together(self, partial: Path, write: Any, *, only_rank_0: bool = False) -> None:
        """Write, and fail on all ranks if it fails on one."""
        problem = ""
        if self._world.rank == 0 or not only_rank_0:
            try:
                write()
            except (OSError, SafetensorError) as error:
                problem = checkpoints.storage_message(error, partial)
        problem = self._world.first_text(problem)
        if problem:
            if self._world.rank == 0:
                checkpoints.discard(partial)
            raise CheckpointError(problem)

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
            "spec_sha256": self._spec.sha256(),
            "corpus_sha256": self._corpus_sha256,
            "world_size": self._world.size,
            "device": _device_name(self._world.device),
            "versions": {"qlora-dist": __version__, **versions},
        }


def get_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """State of every generator that training may draw from, as tensors."""
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    mt = numpy_state["state"]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(
            [*mt["key"].tolist(), mt["pos"], numpy_state["has_gauss"]], dtype=torch.int64
        ),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put back what :func:`get_rng` gave."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *key, pos, has_gauss = state["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(key, np.uint32), pos, has_gauss, state["numpy_gauss"].item())
    )
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / "rng" / f"{rank:05d}.safetensors"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
