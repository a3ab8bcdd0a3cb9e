"""Base and adapter to a Hugging Face model folder, tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from qlora_dist.errors import ModelError, RunDirError
from qlora_dist.layout import RunDir
from qlora_dist.sizes import NF4_BLOCK
from qlora_dist.spec import LoraAdapter, Nf4Quantization, RunSpec
from qlora_dist.train.consolidate import INDEX, PEFT_WEIGHTS, SINGLE
from qlora_dist.train.load import COMPANIONS, base_folder, quantised_layers
from qlora_dist.train.load import DTYPES as MODEL_DTYPES
from qlora_dist.train.tensor_file import DTYPES, Entry, write_tensors

# What the adapter is added to: the base as it was published, or as the adapter saw it in training.
BaseKind = Literal["16bit", "dequantized"]


@dataclass(frozen=True)
class Sources:
    """Base and adapter whose names and shapes agree.

    Attributes:
        folder: The base.
        files: Names of its weight files.
        num_tensors: Tensors in all of them.
        adapter: The adapter.
        quantised: Names of the tensors that the trained model holds in NF4; empty where they are
            not needed.
    """

    spec: RunSpec
    folder: Path
    files: tuple[str, ...]
    num_tensors: int
    adapter: "Adapter"
    quantised: frozenset[str]


class Adapter:
    """The adapter of a run, read matrix by matrix.

    Raises:
        RunDirError: The run has none yet, or it cannot be read.
    """

    def __init__(self, run: RunDir, *, scale: float) -> None:
        self._file = _open_weights(run)
        self._scale = scale
        self._keys = {
            key.removeprefix("base_model.model.").replace(".lora_A.", "."): key
            for key in self._file.keys()  # noqa: SIM118 - no mapping
            if key.endswith(".lora_A.weight")
        }

    @property
    def names(self) -> frozenset[str]:
        """Tensors of the base that it adds to."""
        return frozenset(self._keys)

    def shape(self, name: str) -> tuple[int, int]:
        """Shape ``(out, in)`` of what it adds to a tensor."""
        down, up = (self._file.get_slice(key).get_shape() for key in self._pair(name))
        return up[0], down[1]

    def delta(self, name: str) -> torch.Tensor:
        """``alpha / r * B A``: what it adds to a tensor, float32 of shape ``(out, in)``."""
        down, up = (self._file.get_tensor(key).float() for key in self._pair(name))
        return self._scale * (up @ down)

    def _pair(self, name: str) -> tuple[str, str]:
        down = self._keys[name]
        return down, down.replace(".lora_A.", ".lora_B.")


def open_sources(run: RunDir, spec: RunSpec, *, kinds: Collection[BaseKind]) -> Sources:
    """Find base and adapter, and compare their names and shapes; no weight is read.

    Args:
        run: The run directory.
        spec: Its spec.
        kinds: What is going to be written.

    Raises:
        RunDirError: The run has no adapter yet.
        ModelError: The base is missing or unreadable, or lacks a matrix that the adapter is for or
            that training quantised.
    """
    assert isinstance(spec.adapter, LoraAdapter)
    adapter = Adapter(run, scale=spec.adapter.alpha / spec.adapter.r)
    folder = base_folder(spec)
    files = _weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        shapes |= _shapes(folder / name)
    if lacking := sorted(adapter.names - set(shapes)):
        raise ModelError(f"model.source: {folder} lacks {', '.join(lacking[:3])}")
    quantised: frozenset[str] = frozenset()
    if "dequantized" in kinds:
        quantised = frozenset(f"{name}.weight" for name in quantised_layers(spec))
    if lacking := sorted(quantised - set(shapes)):
        raise ModelError(
            f"model.source: {folder} lacks {', '.join(lacking[:3])}, which training quantised; use "
            "--base 16bit"
        )
    for name in sorted(adapter.names):
        if adapter.shape(name) != shapes[name]:
            raise ModelError(
                f"model.source: {name} of {folder} has shape {shapes[name]}, and the adapter is "
                f"for {adapter.shape(name)}"
            )
    return Sources(spec, folder, files, len(shapes), adapter, quantised)


def write_merged(
    sources: Sources, kind: BaseKind, folder: Path, *, on_tensor: Callable[[], None]
) -> None:
    """Write base + adapter as a new folder; its files are those of the base.

    Each matrix with an adapter becomes ``W + alpha / r * B A``, computed in float32 and rounded
    once; the rest is copied. 16-bit tensors keep their dtype, float32 ones become bfloat16. W is
    the base's matrix or, under "dequantized", what training made of it: cast to ``model.dtype``,
    quantised to NF4 and back. One matrix is in memory at a time.

    Args:
        sources: Base and adapter.
        kind: What W is.
        folder: Must not be there.
        on_tensor: Called before each tensor.

    Raises:
        OSError: It cannot be written.
        SafetensorError: A file of the base cannot be read.
    """
    folder.mkdir(mode=0o700, parents=True)
    for pattern in COMPANIONS:
        for path in sources.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    _set_dtype(folder / "config.json")
    for name in sources.files:
        with safe_open(sources.folder / name, "pt") as file:
            write_tensors(
                folder / name,
                {key: _entry(sources, kind, file, key) for key in file.keys()},  # noqa: SIM118 - no mapping
                metadata=file.metadata() or {"format": "pt"},
                on_tensor=on_tensor,
            )


def _open_weights(run: RunDir) -> Any:
    path = run.adapter / PEFT_WEIGHTS
    if not path.exists():
        raise RunDirError(
            f"{run.adapter} is not there yet; write it with: qlora consolidate {run.root}"
        )
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise RunDirError(
            f"{path} cannot be read: {error}; write it anew with: qlora consolidate {run.root}"
        ) from error


def _weight_files(base: Path) -> tuple[str, ...]:
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        names = tuple(sorted(set(index["weight_map"].values())))
        # An index is a stranger's file: its names must not lead out of the folder.
        if any(Path(name).name != name for name in names):
            raise ModelError(f"model.source: {base / INDEX} names files outside its folder")
        return names
    if (base / SINGLE).is_file():
        return (SINGLE,)
    raise ModelError(f"model.source: {base} holds no safetensors weights")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, "pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            odd = sorted({part.get_dtype() for part in parts.values()} - set(DTYPES))
            shapes = {key: tuple(part.get_shape()) for key, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.source: {path} cannot be read: {error}") from error
    if odd:
        raise ModelError(
            f"model.source: {path} has tensors of dtype {', '.join(odd)}; known are "
            + ", ".join(DTYPES)
        )
    return shapes


def _entry(sources: Sources, kind: BaseKind, file: Any, name: str) -> Entry:
    part = file.get_slice(name)
    stored = DTYPES[part.get_dtype()]
    dtype = torch.bfloat16 if stored == torch.float32 else stored

    def make() -> torch.Tensor:
        weight = file.get_tensor(name)
        if kind == "dequantized" and name in sources.quantised:
            weight = _dequantised(weight, sources.spec)
        if name in sources.adapter.names:
            weight = weight.float() + sources.adapter.delta(name)
        return weight.to(dtype)

    return Entry(dtype, tuple(part.get_shape()), make)


def _dequantised(weight: torch.Tensor, spec: RunSpec) -> torch.Tensor:
    """A matrix as the trained model computes with it, on the CPU, in ``model.dtype``."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    assert isinstance(spec.quantization, Nf4Quantization)
    # Where the trained model is loaded: bitsandbytes' kernels are others on other devices.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = quantize_4bit(
        weight.to(device, MODEL_DTYPES[spec.model.dtype]).contiguous(),
        blocksize=NF4_BLOCK,
        compress_statistics=spec.quantization.double,
        quant_type="nf4",
    )
    return dequantize_4bit(packed, state).cpu()


def _set_dtype(config: Path) -> None:
    tree = json.loads(config.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if tree.get(key) == "float32":
            tree[key] = "bfloat16"
    config.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
