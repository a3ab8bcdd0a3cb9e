"""Whether two runs did the same, bit for bit: what "a resumed run is the unbroken run" means.

Compared are the losses, gradient norms and sample ids of every step, and the weights, moments,
generators and position of a checkpoint. Times and speeds are not.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from qlora_dist import checkpoints
from qlora_dist.layout import RunDir
from qlora_dist.train.checkpoint import MOMENTS, STATE, WEIGHTS, SavedRows
from qlora_dist.train.digest import tensors_sha256

# Of a metrics record, what must be equal; floats as hex, so that a report shows every bit.
_TRAIN = ("loss", "lr", "grad_norm", "tokens", "target_tokens", "position", "samples")
_EVAL = ("loss", "rows")


def differences(left: RunDir, right: RunDir) -> list[str]:
    """Lines that say where two finished runs differ; empty if nowhere."""
    return [*_metric_differences(left, right), *_state_differences(left, right)]


def fingerprint(run: RunDir) -> dict[str, str]:
    """Hashes of the newest checkpoint's parts."""
    path = checkpoints.committed_paths(run.checkpoints)[0]
    checkpoint = checkpoints.read_manifest(path)
    state = json.loads((path / STATE).read_text(encoding="utf-8"))["train"]
    del state["metrics_bytes"]  # times in metrics.jsonl have no fixed width
    found = {"state": json.dumps(state, sort_keys=True)}
    # However they lie over the processes, they are the run's.
    for folder in (WEIGHTS, MOMENTS):
        with SavedRows(checkpoint, folder) as saved:
            found[folder] = tensors_sha256({key: saved.read_whole(key) for key in saved.names})
    for name in checkpoint.manifest["files"]:
        if name.startswith("rng/"):
            found[name] = tensors_sha256(load_file(path / name))
    return found


def records(run: RunDir) -> dict[tuple[str, int], dict[str, Any]]:
    """(kind, step) -> what of the record must be equal."""
    found = {}
    for line in _lines(run.metrics):
        names = _TRAIN if line["kind"] == "train" else _EVAL
        found[line["kind"], line["step"]] = {
            name: value.hex() if isinstance(value := line[name], float) else value for name in names
        }
    return found


def _metric_differences(left: RunDir, right: RunDir) -> Iterator[str]:
    for run in (left, right):
        keys = [(line["kind"], line["step"]) for line in _lines(run.metrics)]
        for kind, step in sorted({key for key in keys if keys.count(key) > 1}):
            yield f"{kind} step {step}: more than once in {run.metrics}"
    ours, theirs = records(left), records(right)
    for key in sorted(set(ours) | set(theirs)):
        kind, step = key
        if key not in ours or key not in theirs:
            yield f"{kind} step {step}: only in {left.root if key in ours else right.root}"
            continue
        for name, value in ours[key].items():
            if value != theirs[key][name]:
                yield f"{kind} step {step}: {name} is {value} and {theirs[key][name]}"


def _state_differences(left: RunDir, right: RunDir) -> Iterator[str]:
    ours, theirs = fingerprint(left), fingerprint(right)
    for name in sorted(set(ours) | set(theirs)):
        if ours.get(name) != theirs.get(name):
            yield f"checkpoint: {name} differs"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
