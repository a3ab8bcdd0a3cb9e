"""What a checkpoint of a run holds, and how it is put back: safetensors and JSON by parameter name.

::

    adapter.safetensors     trainable parameters
    optimizer/00000.safetensors   moments, of each rank that has some of its own
    rng/00000.safetensors   generators of each rank
    state.json              TrainState, the spec, and what PEFT needs to load the adapter
    manifest.json           sizes and hashes of the rest; see qlora_dist.checkpoints

:mod:`qlora_dist.train.saver` writes them.
"""

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from qlora_dist import __version__
from qlora_dist.checkpoints import Checkpoint
from qlora_dist.errors import CheckpointError
from qlora_dist.layout import RunDir
from qlora_dist.resume import check_change, spec_sha256
from qlora_dist.spec import RunSpec
from qlora_dist.spec_file import spec_from_tree
from qlora_dist.train.generators import seed_rng, set_rng
from qlora_dist.train.optimizer import set_moments
from qlora_dist.train.world import World

ADAPTER, STATE = "adapter.safetensors", "state.json"
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
        parameters: Trainable parameters by name, equal on all ranks.
        owned: Those that this process's optimizer is for.
        saves_moments: Whether it writes their moments.
        optimizer: Theirs.
        target_modules: Layers that the adapter is on, as PEFT names them.
        corpus_sha256: Of the corpus; a run goes on only with the one it began with.
        say: Takes lines for a person.
    """

    run: RunDir
    attempt: int
    spec: RunSpec
    world: World
    parameters: Mapping[str, nn.Parameter]
    owned: Mapping[str, nn.Parameter]
    saves_moments: bool
    optimizer: Any
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
    return f"optimizer/{rank:05d}.safetensors"


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
    weights = load_file(path / ADAPTER)
    if set(weights) != set(part.parameters):
        odd = sorted(set(weights) ^ set(part.parameters))
        raise CheckpointError(f"{path}: does not fit the model: {', '.join(odd[:3])}")
    for name, parameter in part.parameters.items():
        parameter.data.copy_(weights[name])
    state = TrainState(**tree["train"])
    saved = _read_moments(part, checkpoint)
    set_moments(part.spec.optimizer, part.optimizer, part.owned, saved, step=state.step)
    _restore_rng(part, checkpoint, state)
    return state


def _read_moments(part: Part, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Moments of this process's parameters, whichever ranks saved them.

    Raises:
        CheckpointError: There are moments of other parameters than the run's.
    """
    found: dict[str, torch.Tensor] = {}
    for name in sorted(checkpoint.manifest["files"]):
        if not name.startswith("optimizer/"):
            continue
        with safe_open(checkpoint.path / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                parameter = key.rpartition(".")[0]
                if parameter not in part.parameters:
                    raise CheckpointError(f"{checkpoint.path}: does not fit the model: {key}")
                if parameter in part.owned:
                    found[key] = file.get_tensor(key)
    return found


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
