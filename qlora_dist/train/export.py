"""Adapter and base to one 16-bit model, file by file of the base."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from qlora_dist import checkpoints
from qlora_dist.errors import CheckpointError, ModelError, RunDirError
from qlora_dist.files import remove_tree, replace_dir, write_json
from qlora_dist.hub import explain, read_token
from qlora_dist.layout import RunDir
from qlora_dist.spec import RunSpec
from qlora_dist.train.consolidate import PEFT_WEIGHTS

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# In every folder that was made here: none but those is ever replaced, and its spec tells generate
# which template the answers were learned after.
MARK = "export.json"
# Everything that a loader reads beside the weights.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")


def export(run: RunDir, spec: RunSpec, output: Path, *, progress: bool = False) -> int:
    """Write base + adapter as a Hugging Face model folder.

    Each matrix with an adapter becomes ``W + alpha / r * B A``, computed in float32 and rounded
    once; the rest is copied. 16-bit tensors keep their dtype, float32 ones become bfloat16. At
    most one file of the base is in memory at a time.

    Returns:
        Matrices that the adapter was merged into.

    Raises:
        RunDirError: The run has no adapter yet, or ``output`` holds something that is no export.
        ModelError: The base is missing, or lacks a matrix that the adapter is for.
        CheckpointError: The folder cannot be written; nothing of it is left.
    """
    base = base_folder(spec)
    _refuse_to_overwrite(output)
    deltas = _Deltas(run.adapter / PEFT_WEIGHTS, scale=spec.adapter.alpha / spec.adapter.r)
    new = output.with_name(output.name + ".partial")
    try:
        remove_tree(new)
        new.mkdir(mode=0o700, parents=True)
        for pattern in _COMPANIONS:
            for path in base.glob(pattern):
                shutil.copyfile(path, new / path.name)
        _set_dtype(new / "config.json")
        for name in tqdm(_weight_files(base), unit="file", disable=not progress):
            _merge_file(base / name, new / name, deltas)
        if left := deltas.unused():
            raise ModelError(f"model.source: {base} lacks {', '.join(left[:3])}")
        write_json(new / MARK, {"run": spec.name, "spec": spec.model_dump(mode="json")})
        replace_dir(new, output)
    except (OSError, SafetensorError) as error:
        checkpoints.discard(new)
        raise CheckpointError(checkpoints.storage_message(error, output)) from error
    except ModelError:
        checkpoints.discard(new)
        raise
    return deltas.count


def base_folder(spec: RunSpec) -> Path:
    """The base's folder: local, or in the hub's cache, fetched if need be.

    Raises:
        ModelError: It is missing or gated.
    """
    path = Path(spec.model.source).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                spec.model.source,
                revision=spec.model.revision,
                allow_patterns=[*_COMPANIONS, "*.safetensors"],
                token=read_token(spec.model.token_file),
            )
        )
    except (OSError, ValueError) as error:
        message = explain(error, kind="model", key="model.source", source=spec.model.source)
        raise ModelError(message) from error


def _refuse_to_overwrite(output: Path) -> None:
    """Only an earlier export, or an empty folder, gives way to a new one."""
    if output.is_dir() and (not any(output.iterdir()) or (output / MARK).is_file()):
        return
    if output.exists():
        raise RunDirError(
            f"{output} is there and was not made by qlora export; choose another --output"
        )


class _Deltas:
    """What the adapter adds to each matrix."""

    def __init__(self, path: Path, *, scale: float) -> None:
        if not path.exists():
            raise RunDirError(
                f"{path.parent} is not there yet; write it with: qlora consolidate "
                f"{path.parent.parent}"
            )
        self._scale = scale
        with safe_open(path, "pt") as file:
            self._weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        self._modules = {
            key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): key
            for key in self._weights
            if key.endswith(".lora_A.weight")
        }
        self.count = len(self._modules)

    def pop(self, tensor_name: str) -> torch.Tensor | None:
        """What to add to a tensor of the base, in float32; None where there is no adapter."""
        key = self._modules.pop(tensor_name.removesuffix(".weight"), None)
        if key is None:
            return None
        down = self._weights[key].float()
        up = self._weights[key.replace(".lora_A.", ".lora_B.")].float()
        return self._scale * (up @ down)

    def unused(self) -> list[str]:
        """Matrices that the base did not have."""
        return sorted(self._modules)


def _weight_files(base: Path) -> list[str]:
    if (base / _INDEX).is_file():
        index = json.loads((base / _INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        # An index is a stranger's file: its names must not lead out of the folder.
        if any(Path(name).name != name for name in names):
            raise ModelError(f"model.source: {base / _INDEX} names files outside its folder")
        return names
    if (base / _SINGLE).is_file():
        return [_SINGLE]
    raise ModelError(f"model.source: {base} holds no safetensors weights")


def _merge_file(source: Path, target: Path, deltas: _Deltas) -> None:
    merged: dict[str, torch.Tensor] = {}
    with safe_open(source, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            weight = file.get_tensor(name)
            dtype = torch.bfloat16 if weight.dtype == torch.float32 else weight.dtype
            delta = deltas.pop(name)
            if delta is not None:
                weight = weight.float() + delta
            merged[name] = weight.to(dtype).contiguous()
        metadata = file.metadata()
    save_file(merged, target, metadata=metadata or {"format": "pt"})


def _set_dtype(config: Path) -> None:
    tree = json.loads(config.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if tree.get(key) == "float32":
            tree[key] = "bfloat16"
    config.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
