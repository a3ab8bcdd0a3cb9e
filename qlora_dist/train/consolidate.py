"""A checkpoint to the adapter that ``PeftModel.from_pretrained`` reads."""

import contextlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qlora_dist import checkpoints, faults
from qlora_dist.checkpoints import Checkpoint, newest_step
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import CheckpointError, ModelError, RunDirError, UserError
from qlora_dist.files import remove_tree, replace_dir, write_json
from qlora_dist.layout import RunDir
from qlora_dist.spec import RunSpec
from qlora_dist.train.checkpoint import ADAPTER, STATE
from qlora_dist.train.tensor_file import Entry, write_tensors

PEFT_WEIGHTS = "adapter_model.safetensors"


def consolidate(run: RunDir, spec: RunSpec, which: str = "last") -> Checkpoint:
    """Write ``RUN/adapter`` from a checkpoint.

    Args:
        run: The run directory.
        spec: Its spec.
        which: "last", "best", or a step.

    Returns:
        The checkpoint that it was made from.

    Raises:
        CheckpointError: The checkpoint is damaged, or the folder cannot be written.
        UserError: There is no such checkpoint.
    """
    checkpoint = find_checkpoint(run, which)
    new = run.adapter.with_name("adapter.partial")
    try:
        remove_tree(new)
        new.mkdir(mode=0o700)
        faults.reach("consolidation")
        _write_config(checkpoint, spec, new, newest_step(run.checkpoints))
        with safe_open(checkpoint.path / ADAPTER, "pt") as file:
            entries = {key: Entry.in_file(file, key) for key in file.keys()}  # noqa: SIM118 - no mapping
            write_tensors(new / PEFT_WEIGHTS, entries, metadata={"format": "pt"})
        # As PEFT's users expect; the adapter is whole without it, where the base is not at hand.
        with contextlib.suppress(ModelError):
            load_tokenizer(spec).save_pretrained(new)
        replace_dir(new, run.adapter)
    except (OSError, SafetensorError) as error:
        checkpoints.discard(new)
        raise CheckpointError(checkpoints.storage_message(error, run.adapter)) from error
    return checkpoint


def consolidated_at(run: RunDir) -> int | None:
    """The newest committed step when RUN/adapter was written; None where there is none.

    An adapter of an older checkpoint may have been chosen by hand; one that was written when the
    run was shorter is out of date.
    """
    try:
        tree = json.loads((run.adapter / "training.json").read_text(encoding="utf-8"))
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


def _write_config(checkpoint: Checkpoint, spec: RunSpec, folder: Path, newest: int) -> None:
    from peft import LoraConfig

    state = json.loads((checkpoint.path / STATE).read_text(encoding="utf-8"))
    config = LoraConfig(
        r=spec.adapter.r,
        lora_alpha=spec.adapter.alpha,
        lora_dropout=spec.adapter.dropout,
        target_modules=state["target_modules"],
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=spec.model.source,
        revision=spec.model.revision,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    write_json(
        folder / "training.json",
        {
            "run": spec.name,
            "step": checkpoint.step,
            "newest_step": newest,
            "spec_sha256": checkpoint.manifest["spec_sha256"],
            "versions": checkpoint.manifest["versions"],
            "spec": spec.model_dump(mode="json"),
        },
    )
