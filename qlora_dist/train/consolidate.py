"""A checkpoint to the adapter or the model that PEFT's and transformers' users load."""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from qlora_dist import checkpoints, faults
from qlora_dist.checkpoints import Checkpoint, newest_step
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import CheckpointError, ModelError, RunDirError, UserError
from qlora_dist.files import remove_tree, replace_dir, write_json
from qlora_dist.layout import RunDir
from qlora_dist.spec import LoraAdapter, RunSpec
from qlora_dist.train.checkpoint import STATE, WEIGHTS, SavedRows
from qlora_dist.train.load import COMPANIONS, DTYPES, base_folder
from qlora_dist.train.tensor_file import Entry, write_tensors

PEFT_WEIGHTS = "adapter_model.safetensors"
# What training was, beside its result.
TRAINING = "training.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# As transformers cuts a model into files.
_FILE_BYTES = 5 * 10**9


def result_name(spec: RunSpec) -> str:
    """What a run ends with."""
    return "adapter" if isinstance(spec.adapter, LoraAdapter) else "model"


def result_dir(run: RunDir, spec: RunSpec) -> Path:
    """Where it is."""
    return run.adapter if isinstance(spec.adapter, LoraAdapter) else run.model


def consolidate(
    run: RunDir, spec: RunSpec, which: str = "last", *, on_tensor: Callable[[], None] = lambda: None
) -> Checkpoint:
    """Write ``RUN/adapter`` or ``RUN/model`` from a checkpoint.

    Args:
        run: The run directory.
        spec: Its spec.
        which: "last", "best", or a step.
        on_tensor: Called before each tensor; what it raises leaves nothing behind.

    Returns:
        The checkpoint that it was made from.

    Raises:
        CheckpointError: The checkpoint is damaged, or the folder cannot be written.
        ModelError: The base of a full fine-tuning run is not there, whose settings the model has.
        UserError: There is no such checkpoint.
    """
    checkpoint, folder = find_checkpoint(run, which), result_dir(run, spec)
    new = folder.with_name(f"{folder.name}.partial")
    try:
        remove_tree(new)
        new.mkdir(mode=0o700)
        faults.reach("consolidation")
        with SavedRows(checkpoint, WEIGHTS) as weights:
            if not weights.names:
                raise CheckpointError(f"{checkpoint.path} holds no weights")
            if isinstance(spec.adapter, LoraAdapter):
                _write_adapter(checkpoint, spec, spec.adapter, weights, new, on_tensor)
            else:
                _write_model(spec, weights, new, on_tensor)
        _write_training(checkpoint, spec, new, newest_step(run.checkpoints))
        replace_dir(new, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(checkpoints.storage_message(error, folder)) from error
    finally:
        checkpoints.discard(new)
    return checkpoint


def consolidated_at(run: RunDir, spec: RunSpec) -> int | None:
    """The newest committed step when the result was written; None where there is none.

    One of an older checkpoint may have been chosen by hand; one that was written when the run was
    shorter is out of date.
    """
    try:
        tree = json.loads((result_dir(run, spec) / TRAINING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return int(tree.get("newest_step", tree["step"]))


def find_checkpoint(run: RunDir, which: str) -> Checkpoint:
    """The checkpoint that "last", "best" or a step names, checked.

    Raises:
        CheckpointError: It is damaged.
        UserError: There is none.
    """
    paths = {int(p.name[5:]): p for p in checkpoints.committed_paths(run.checkpoints)}
    if not paths:
        raise RunDirError(f"{run.root} has no checkpoint yet")
    if which.isdecimal():
        step: int | None = int(which)
    elif which in ("last", "best"):
        last = checkpoints.open_checkpoint(paths[max(paths)])
        if which == "last":
            return last
        state = json.loads((last.path / STATE).read_text(encoding="utf-8"))
        step = state["train"]["best_step"]
    else:
        step = None
    if step not in paths:
        raise UserError(
            f"{run.root} has no checkpoint {which!r}; there are last and "
            + ", ".join(map(str, sorted(paths)))
        )
    return checkpoints.open_checkpoint(paths[step])


def _write_adapter(
    checkpoint: Checkpoint,
    spec: RunSpec,
    adapter: LoraAdapter,
    weights: SavedRows,
    folder: Path,
    on_tensor: Callable[[], None],
) -> None:
    """What ``PeftModel.from_pretrained`` reads."""
    from peft import LoraConfig

    state = json.loads((checkpoint.path / STATE).read_text(encoding="utf-8"))
    LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=state["target_modules"],
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=spec.model.source,
        revision=spec.model.revision,
        inference_mode=True,
    ).save_pretrained(folder)
    entries = {name: _entry(weights, name, weights.dtype(name)) for name in weights.names}
    metadata = {"format": "pt"}
    write_tensors(folder / PEFT_WEIGHTS, entries, metadata=metadata, on_tensor=on_tensor)
    # As PEFT's users expect; the adapter is whole without it, where the base is not at hand.
    with contextlib.suppress(ModelError):
        load_tokenizer(spec).save_pretrained(folder)


def _write_model(
    spec: RunSpec, weights: SavedRows, folder: Path, on_tensor: Callable[[], None]
) -> None:
    """What ``AutoModelForCausalLM.from_pretrained`` reads, in ``model.dtype``."""
    dtype = DTYPES[spec.model.dtype]
    for pattern in COMPANIONS:
        for path in base_folder(spec).glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    _set_dtype(folder / "config.json", dtype)
    entries = {name: _entry(weights, name, dtype) for name in weights.names}
    files = _files_of({name: entry.num_bytes for name, entry in entries.items()})
    for file, names in files.items():
        part = {name: entries[name] for name in names}
        write_tensors(folder / file, part, metadata={"format": "pt"}, on_tensor=on_tensor)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(entry.num_bytes for entry in entries.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        write_json(folder / INDEX, index)


def _entry(weights: SavedRows, name: str, dtype: torch.dtype) -> Entry:
    return Entry(dtype, weights.shape(name), lambda: weights.read_whole(name).to(dtype))


def _files_of(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Names of tensors by the file that they go into, in their order."""
    groups: list[list[str]] = [[]]
    room = _FILE_BYTES
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = _FILE_BYTES
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": names
        for number, names in enumerate(groups, start=1)
    }


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Say in config.json what the weights are; older ones have another key for it."""
    tree: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    tree.pop("torch_dtype", None)
    tree["dtype"] = str(dtype).removeprefix("torch.")
    write_json(config, tree)


def _write_training(checkpoint: Checkpoint, spec: RunSpec, folder: Path, newest: int) -> None:
    write_json(
        folder / TRAINING,
        {
            "run": spec.name,
            "step": checkpoint.step,
            "newest_step": newest,
            "spec_sha256": checkpoint.manifest["spec_sha256"],
            "versions": checkpoint.manifest["versions"],
            "spec": spec.model_dump(mode="json"),
        },
    )
