"""``make fidelity``: our training beside a plain loop, loss by loss and gradient by gradient.

Ours runs through ``qlora run`` with a checkpoint after every step. A clipped gradient is read back
from two successive first moments of AdamW: ``g = (m' - beta1 m) / (1 - beta1)``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
COMBINATIONS = [(processes, accumulation) for processes in (1, 2) for accumulation in (1, 2, 4)]
BETA1 = 0.9
SETTINGS = {"max-tokens": 96, "r": 8, "alpha": 16, "threads": 1, "lr": 1e-3, "max-grad-norm": 1.0}


def run_ours(folder: Path, model: Path, data: Path, processes: int, accumulation: int, steps: int):
    """Train through the command line; returns losses, sample ids and clipped gradients."""
    spec = {
        "name": "ours",
        "run_dir": str(folder / "ours"),
        "model": {"source": str(model), "dtype": "fp32", "gradient_checkpointing": False},
        "adapter": {"r": SETTINGS["r"], "alpha": SETTINGS["alpha"], "dropout": 0.0},
        "data": {"source": str(data), "format": "ptt", "max_tokens": SETTINGS["max-tokens"]},
        "optimizer": {
            "kind": "adamw",
            "lr": SETTINGS["lr"],
            "beta1": BETA1,
            "max_grad_norm": SETTINGS["max-grad-norm"],
        },
        "schedule": {"kind": "constant", "warmup_steps": 1, "steps": steps},
        "batch": {"global_size": processes * accumulation, "micro_size": 1},
        "strategy": {"kind": "ddp"},
        "resources": {
            "gpus_per_node": 0,
            "processes_per_node": processes,
            "cpus_per_process": SETTINGS["threads"],
        },
        "checkpoint": {"every_steps": 1, "keep_last": steps + 1},
    }
    config = folder / "ours.yaml"
    config.write_text(json.dumps(spec), encoding="utf-8")
    command = [sys.executable, "-m", "qlora_launch.cli", "run", str(config)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "ours" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    checkpoints = sorted((folder / "ours" / "checkpoints").iterdir())
    gradients, before = {}, {}
    for step, checkpoint in enumerate(checkpoints):
        moments = load_file(checkpoint / "optimizer" / "00000.safetensors")
        now = {k.removesuffix(".exp_avg"): m for k, m in moments.items() if k.endswith(".exp_avg")}
        for key, moment in now.items():
            past = before.get(key, torch.zeros_like(moment)).double()
            gradients[f"{step}:{key}"] = (moment.double() - BETA1 * past) / (1 - BETA1)
        before = now
    return [r["loss"] for r in records], [r["samples"] for r in records], gradients


def run_reference(folder, model, data, processes, accumulation, steps, order):
    """Train with the plain loop, from the adapter that ours began with."""
    (folder / "order.json").write_text(json.dumps(order), encoding="utf-8")
    # The first step has learning rate 0, so its checkpoint holds the adapter as it began.
    start = folder / "ours" / "checkpoints" / "step_000001" / "weights" / "00000.safetensors"
    options = {
        "model": model,
        "data": data,
        "start": start,
        "output": folder / "reference",
        "order": folder / "order.json",
        "processes": processes,
        "accumulation": accumulation,
        "steps": steps,
        **SETTINGS,
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    script = str(ROOT / "bench" / "reference_loop.py")
    subprocess.run(
        [sys.executable, script, *arguments], check=True, stderr=subprocess.DEVNULL, cwd=folder
    )
    losses = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    return losses, load_file(folder / "reference.safetensors")


def compare(model: Path, data: Path, processes: int, accumulation: int, steps: int):
    """Largest relative differences of one combination: (losses, gradients)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        losses, order, gradients = run_ours(folder, model, data, processes, accumulation, steps)
        theirs, their_gradients = run_reference(
            folder, model, data, processes, accumulation, steps, order
        )
    assert len(losses) == len(theirs) == steps
    assert set(gradients) == set(their_gradients)
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses, theirs, strict=True))
    gradient = 0.0
    for key, theirs_ in their_gradients.items():
        norm = theirs_.double().norm()
        difference = (gradients[key] - theirs_.double()).norm()
        # A's gradient is 0 while B is; there the difference must be 0 too.
        gradient = max(gradient, float(difference / norm) if norm else float(difference))
    return loss, gradient


def main() -> int:
    """Print the table; the exit code says whether every line is within its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT / "demo" / "corpus.txt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", help="processes,accumulation")
    args = parser.parse_args()
    args.model, args.data = args.model.absolute(), args.data.absolute()
    combinations = COMBINATIONS
    if args.only:
        combinations = [tuple(int(part) for part in args.only.split(","))]
    print("processes  accumulation  steps  loss (rel. <= 1e-6)  gradient (rel. <= 1e-5)")
    good = True
    for processes, accumulation in combinations:
        loss, gradient = compare(args.model, args.data, processes, accumulation, args.steps)
        good &= loss <= 1e-6 and gradient <= 1e-5
        print(
            f"{processes:>9}  {accumulation:>12}  {args.steps:>5}  {loss:>19.2e}  "
            f"{gradient:>23.2e}",
            flush=True,
        )
    print("within the bounds" if good else "NOT within the bounds")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
