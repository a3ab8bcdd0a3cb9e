"""``make gpu-line``: the whole line on one GPU, and on two with NCCL.

Each row of the first table is a run that was stopped by a SIGTERM and resumed, beside the same run
without a stop; the second table sets a LLaMA-7B-shaped run beside its plan. Everything goes through
the command line.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from models import make_model, make_rows

from qlora_dist.layout import RunDir
from qlora_dist.plan import make_plan
from qlora_dist.sizes import GIB
from qlora_dist.spec_file import load_spec
from qlora_dist.train.compare import differences, records

LOGS = Path(os.environ.get("OUT", "."))


def qlora(*arguments, code=0):
    """Run a command; its output goes to a log unless it fails."""
    command = [sys.executable, "-m", "qlora_launch.cli", *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    with (LOGS / "gpu_line.log").open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    if done.returncode != code:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout}")


def stop_at(step, run):
    """Start a prepared run and stop it by a SIGTERM to the launcher after a step."""
    command = [sys.executable, "-m", "qlora_launch.cli", "resume", str(run.root)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while ("train", step) not in (records(run) if run.metrics.exists() else {}):
        if process.poll() is not None:
            raise SystemExit(f"{run.root} ended before step {step}")
        time.sleep(0.02)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    if process.wait() != 85:
        raise SystemExit(f"{run.root} ended with {process.returncode}, not 85")
    return time.monotonic() - begin


def write_config(folder, name, model, data, gpus, changes):
    """One config file; ``changes`` are merged into its sections."""
    spec = {
        "name": name,
        "run_dir": str(folder / name),
        "deterministic": True,
        "model": {"source": str(model), "dtype": "bf16", "gradient_checkpointing": False},
        "quantization": {"kind": "nf4"},
        "adapter": {"r": 128, "alpha": 16, "dropout": 0.05},
        "data": {
            "source": str(data),
            "format": "input-output",
            "max_tokens": 256,
            "validation_rows": 16,
        },
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "cosine", "steps": 8, "warmup_steps": 2},
        "batch": {"global_size": 8, "micro_size": 2},
        "strategy": {"kind": "single" if gpus <= 1 else "ddp"},
        "resources": {"gpus_per_node": gpus, "gpu": "h100-80gb"},
        "checkpoint": {"every_steps": 6},
        "evaluation": {"every_steps": 4, "micro_size": 16},
    }
    for section, values in changes.items():
        spec[section] = spec[section] | values if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def check_resume(folder, model, data, gpus, optimizer):
    """One row of the first table; returns whether all was equal, and the unbroken run."""
    stem = f"{optimizer}-{gpus}"
    changes = {"optimizer": {"kind": optimizer, "lr": 1e-3}}
    whole, broken = (RunDir(folder / f"{part}-{stem}") for part in ("whole", "broken"))
    qlora("run", write_config(folder, whole.root.name, model, data, gpus, changes))
    qlora("run", write_config(folder, broken.root.name, model, data, gpus, changes), "--prepare")
    to_exit = stop_at(3, broken)
    qlora("resume", broken.root)
    different = differences(whole, broken)
    first, last = (float.fromhex(records(whole)["eval", step]["loss"]) for step in (0, 8))
    print(
        f"{gpus:>4}  {optimizer:<18}  {'yes' if not different else 'NO':>20}  "
        f"{to_exit:>15.1f}  {first:.4f} -> {last:.4f}",
        flush=True,
    )
    for line in different[:6]:
        print(f"      {line}", flush=True)
    return not different, whole


def check_worlds(one, two):
    """Sample ids and losses of one GPU and of two."""
    ours, theirs = records(one), records(two)
    steps = [key for key in ours if key[0] == "train"]
    same = all(ours[key]["samples"] == theirs[key]["samples"] for key in steps)
    worst = max(
        abs(float.fromhex(ours[key]["loss"]) / float.fromhex(theirs[key]["loss"]) - 1)
        for key in steps
    )
    print(
        f"one GPU and two: sample ids {'equal' if same else 'DIFFERENT'}, losses within "
        f"{worst:.1e} (bf16, dropout drawn per rank)"
    )
    return same


def measure(folder, model, data, gpus, changes, label):
    """One row of the second table: speed and peak beside the plan."""
    name = "size-" + "".join(c for c in label if c.isalnum()) + f"-{gpus}"
    path = write_config(folder, name, model, data, gpus, changes)
    plan = make_plan(load_spec(path))
    qlora("run", path)
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    train = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    # The first steps warm kernels and the allocator up.
    speeds = sorted(r["tokens_per_s"] for r in train[3:])
    peak = max(r["peak_memory_bytes"] for r in train)
    predicted = plan.memory.peak_bytes
    print(
        f"{gpus:>4}  {label:<28}  {speeds[len(speeds) // 2]:>10,.0f}  {peak / GIB:>8.2f}  "
        f"{predicted / GIB:>8.2f}  {predicted / peak - 1:>+12.1%}",
        flush=True,
    )


def header():
    """What this was measured on."""
    import bitsandbytes
    import peft
    import transformers

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{datetime.date.today()}  {', '.join(names) or 'CPU'}")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft "
        f"{peft.__version__}, bitsandbytes {bitsandbytes.__version__}"
    )


def resume_table(folder, worlds):
    """First table; returns whether every check passed."""
    model = make_model(folder / "small", "smollm2-135m", num_layers=8)
    data = make_rows(folder / "rows.jsonl", num_rows=120, lines_per_row=5)
    print("\nSmolLM2 shape, 8 layers, random weights, NF4, r = 128, dropout 0.05, deterministic")
    print("GPUs  optimizer           resumed = unbroken  signal to end, s  held-out loss")
    good, unbroken = True, {}
    for gpus in worlds:
        equal, unbroken[gpus] = check_resume(folder, model, data, gpus, "paged_adamw_32bit")
        good &= equal
    if 2 in worlds:
        good &= check_worlds(unbroken[1], unbroken[2])
    return good


def size_table(folder, worlds):
    """Second table: figures, and nothing that could fail."""
    model = make_model(folder / "large", "llama-7b")
    data = make_rows(folder / "long.jsonl", num_rows=200, lines_per_row=150)
    changes = {
        "deterministic": False,
        "adapter": {"r": 64, "alpha": 16, "dropout": 0.1},
        "data": {"max_tokens": 2048, "validation_rows": 0},
        "model": {"gradient_checkpointing": True},
        "optimizer": {"kind": "paged_adamw_32bit", "lr": 2e-4},
        "schedule": {"kind": "constant", "steps": 8, "warmup_steps": 0},
        "batch": {"global_size": 8, "micro_size": 4},
        "checkpoint": {"every_steps": 100},
    }
    print("\nLLaMA-7B shape, random weights, NF4 with double quantisation, r = 64")
    print("GPUs  what                            tokens/s  peak GiB  plan GiB   plan off by")
    for gpus in worlds:
        measure(folder, model, data, gpus, changes, "4 x 2048, recomputed")


def main():
    """Print both tables; the exit code says whether every check passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["resume", "size"], help="one of the two tables")
    args = parser.parse_args()
    worlds = [1, 2][: torch.cuda.device_count()]
    good = True
    header()
    with tempfile.TemporaryDirectory() as name:
        if args.only != "size":
            good = resume_table(Path(name), worlds)
            print("all checks passed" if good else "NOT all checks passed", flush=True)
        if args.only != "resume":
            size_table(Path(name), worlds)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
