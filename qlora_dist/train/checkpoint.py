"""What a checkpoint of a run holds, and how it is put back: safetensors and JSON by parameter name.

::

    weights/00000.safetensors     what is trained: each rank's part, or all of it, of rank 0
    optimizer/00000.safetensors   moments, of each rank that has some of its own
    rng/00000.safetensors         generators of each rank
    state.json                    TrainState, the spec, shapes, what PEFT needs for an adapter
    manifest.json                 sizes and hashes of the rest; see qlora_dist.checkpoints

:mod:`qlora_dist.train.saver` writes them. Parts of ranks are neighbours in the order of the ranks,
so that any number of processes, under any strategy, finds its own (:class:`SavedRows`).
"""

import contextlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_dist import __version__
from qlora_dist.checkpoints import Checkpoint
from qlora_dist.errors import CheckpointError
from qlora_dist.layout import RunDir
from qlora_dist.resume import check_change, spec_sha256
from qlora_dist.spec import RunSpec
from qlora_dist.spec_file import spec_from_tree
from qlora_dist.train.generators import seed_rng, set_rng
from qlora_dist.train.optimizer import set_moments
from qlora_dist.train.tensor_file import DTYPES
from qlora_dist.train.trained import Trained
from qlora_dist.train.world import World

WEIGHTS, MOMENTS, STATE = "weights", "optimizer", "state.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


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


@dataclass(frozen=True)
class Part:
    """One process's part of a run: what is saved and restored.

    Attributes:
        attempt: Of the run; what an older one saves, when a newer has begun, is not committed.
        trained: What is trained, as this process has it.
        target_modules: Layers that an adapter is on, as PEFT names them.
        corpus_sha256: Of the corpus; a run goes on only with the one it began with.
        say: Takes lines for a person.
    """

    run: RunDir
    attempt: int
    spec: RunSpec
    world: World
    trained: Trained
    target_modules: list[str]
    corpus_sha256: str
    say: Callable[[str], None]

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the run that it was made in."""
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        device = self.world.device
        return {
            "spec_sha256": spec_sha256(self.spec),
            "corpus_sha256": self.corpus_sha256,
            "world_size": self.world.size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "versions": {"qlora-dist": __version__, **versions},
        }


def rng_name(rank: int) -> str:
    """A rank's generators, as a name in a checkpoint."""
    return f"rng/{rank:05d}.safetensors"


def moments_name(rank: int) -> str:
    """The moments that a rank saves, as a name in a checkpoint."""
    return f"{MOMENTS}/{rank:05d}.safetensors"


def weights_name(rank: int) -> str:
    """The weights that a rank saves, as a name in a checkpoint."""
    return f"{WEIGHTS}/{rank:05d}.safetensors"


@torch.no_grad()
def restore(part: Part, checkpoint: Checkpoint) -> TrainState:
    """Put a checkpoint's state into the parameters, the optimizer and the generators.

    Raises:
        CheckpointError: It is not of this run, or does not fit the model.
        PlanError: The spec has changed in a key that may not.
    """
    path, manifest = checkpoint.path, checkpoint.manifest
    tree = json.loads((path / STATE).read_text(encoding="utf-8"))
    for line in check_change(spec_from_tree(tree["spec"], source=str(path)), part.spec):
        part.say(line)
    if manifest["corpus_sha256"] != part.corpus_sha256:
        sources = ", ".join(dataset.source for dataset in part.spec.data.datasets)
        raise CheckpointError(
            f"{path}: the data is not the one that the run began with (data.source: {sources});"
            " put it back, or start a new run"
        )
    _say_changes(part, manifest)
    state = TrainState(**tree["train"])
    with SavedRows(checkpoint, WEIGHTS) as weights, SavedRows(checkpoint, MOMENTS) as moments:
        weights.check({name: held.shape for name, held in part.trained.held.items()})
        for name, held in part.trained.held.items():
            found = weights.read(name, held.start, held.tensor.numel())
            held.tensor.copy_(found.view(held.tensor.shape))
        _restore_moments(part, moments, step=state.step)
    part.trained.restored()
    _restore_rng(part, checkpoint, state)
    return state


def _restore_moments(part: Part, saved: "SavedRows", *, step: int) -> None:
    """Put back the moments of what this process steps, whichever ranks saved them."""
    held, stepped = part.trained.held, part.trained.stepped
    parameter_of = {key: key.rpartition(".")[0] for key in saved.names}
    if odd := sorted(set(parameter_of.values()) - set(held)):
        raise CheckpointError(f"{saved.path}: does not fit the model: {', '.join(odd[:3])}")
    wanted = {key for key, name in parameter_of.items() if name in stepped}
    if step:
        part.trained.allocate(step)

    def read(key: str) -> torch.Tensor:
        its = held[parameter_of[key]]
        if tuple(its.tensor.shape) == its.shape:
            # Moments of 8 bits have constants beside them, of other shapes.
            return saved.read_whole(key)
        return saved.read(key, its.start, its.tensor.numel()).view(its.tensor.shape)

    set_moments(part.trained.moments(), wanted, read)


class SavedRows:
    """Tensors of a checkpoint that one rank saved whole, or several in parts.

    A part is neighbouring rows, or neighbouring elements without a shape; parts follow one another
    in the order of the ranks.

    Args:
        checkpoint: The checkpoint.
        folder: Of the files, inside it.

    Attributes:
        path: Of the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, folder: str) -> None:
        self.path = checkpoint.path
        self._names = sorted(
            name for name in checkpoint.manifest["files"] if name.startswith(f"{folder}/")
        )
        self._open = contextlib.ExitStack()
        self._parts: dict[str, list[Any]] = {}
        self._shapes: dict[str, list[int]] = {}

    def __enter__(self) -> "SavedRows":
        state = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        self._shapes = state.get("shapes", {})
        for name in self._names:
            file = self._open.enter_context(safe_open(self.path / name, "pt"))
            for key in file.keys():  # noqa: SIM118 - no mapping
                self._parts.setdefault(key, []).append(file.get_slice(key))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._parts.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of all of a tensor."""
        shapes = [part.get_shape() for part in self._parts[name]]
        # A moment is named after its weight.
        weight = self._shapes.get(name) or self._shapes.get(name.rpartition(".")[0])
        if weight and sum(map(math.prod, shapes)) == math.prod(weight):
            return tuple(weight)
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with those of the model.

        Raises:
            CheckpointError: They differ.
        """
        there = {name: self.shape(name) for name in self.names}
        odd = [name for name in sorted({*there, *shapes}) if there.get(name) != shapes.get(name)]
        if odd:
            raise CheckpointError(f"{self.path}: does not fit the model: {', '.join(odd[:3])}")

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return DTYPES[self._parts[name][0].get_dtype()]

    def read_whole(self, name: str) -> torch.Tensor:
        """All of a tensor, in its shape."""
        shape = self.shape(name)
        return self.read(name, 0, math.prod(shape)).view(shape)

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Neighbouring elements of a tensor, ``(count,)``."""
        found, begin = [], 0
        for part in self._parts[name]:
            shape = part.get_shape()
            row, size = math.prod(shape[1:]), math.prod(shape)
            a, b = max(start - begin, 0), min(start + count - begin, size)
            if a < b:
                rows = part[a // row : -(-b // row)].reshape(-1)
                found.append(rows[a % row : a % row + b - a])
            begin += size
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else self._parts[name][0][0:0].reshape(-1)


def _restore_rng(part: Part, checkpoint: Checkpoint, state: TrainState) -> None:
    before, now = checkpoint.manifest["world_size"], part.world.size
    rng: dict[str, torch.Tensor] = {}
    if before == now:
        rng = load_file(checkpoint.path / rng_name(part.world.rank))
    if rng and ("cuda" in rng) == (part.world.device.type == "cuda"):
        set_rng(rng, part.world.device)
        return
    seed_rng(part.spec.seed, part.world.rank, state.step)
    part.say(
        f"{now} processes go on where {before} stopped, or on another kind of device: their "
        "generators are seeded anew from seed, rank and step"
    )


def _say_changes(part: Part, manifest: Mapping[str, Any]) -> None:
    """A run goes on with other versions or GPUs, and is then no longer the same bits."""
    facts = part.facts()
    before = {"device": manifest["device"], **manifest["versions"]}
    for name, value in {"device": facts["device"], **facts["versions"]}.items():
        if before.get(name) != value:
            part.say(f"{name} was {before.get(name)} and is {value}: not bit for bit the same")
