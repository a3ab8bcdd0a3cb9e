"""``make gpu-65b``: LLaMA-65B's shape on one and two GPUs, from a cache in NF4.

The cache is written directly, of random weights: its 16-bit base is a hole in a file. The first
table is speed and memory beside the plan; then a run is killed while it trains, and again while it
loads, and has to end as the unbroken run. Everything goes through the command line.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_exact import meet
from gpu_line import header, measure, qlora, write_config
from models import make_rows
from random_base import write_cache, write_sparse_base

from qlora_dist.layout import RunDir
from qlora_dist.sizes import GIB
from qlora_dist.spec_file import load_spec
from qlora_dist.train.compare import differences, records

SHAPE = "llama-65b"


def sizes(gpus):
    """Rows of the first table: label -> changes."""
    common = {
        "deterministic": False,
        "model": {"gradient_checkpointing": True},
        "data": {"max_tokens": 2048, "validation_rows": 0},
        "optimizer": {"kind": "paged_adamw_32bit", "lr": 1e-4},
        "schedule": {"kind": "constant", "steps": 5, "warmup_steps": 0},
        "checkpoint": {"every_steps": 100},
    }
    adapter = {"r": 64, "alpha": 16, "dropout": 0.05}
    if gpus == 1:
        short = common | {
            "data": {"max_tokens": 512, "validation_rows": 0},
            "batch": {"global_size": 2, "micro_size": 1},
        }
        return {
            "1 x 512, bf16 adapter": short | {"adapter": adapter | {"dtype": "bf16"}},
            "1 x 512, fp32 adapter": short | {"adapter": adapter},
        }
    long = common | {"strategy": {"kind": "fsdp"}, "batch": {"global_size": 4, "micro_size": 2}}
    return {"fsdp, 2 x 2048": long | {"adapter": adapter}}


def size_table(folder, cache_dir, model, worlds):
    """Speed and peak of runs beside their plan."""
    data = make_rows(folder / "long.jsonl", num_rows=60, lines_per_row=150)
    print("\nGPUs  what                            tokens/s  peak GiB  plan GiB   plan off by")
    for gpus in worlds:
        for label, changes in sizes(gpus).items():
            more = {"quantization": {"kind": "nf4", "cache_dir": str(cache_dir)}}
            measure(folder, model, data, gpus, changes | more, label)


def kills(folder, cache_dir, model, gpus):
    """SIGKILL while training, then while loading; returns whether it ends as the unbroken run."""
    data = make_rows(folder / "rows.jsonl", num_rows=40, lines_per_row=8)
    changes = {
        "quantization": {"kind": "nf4", "cache_dir": str(cache_dir)},
        "model": {"gradient_checkpointing": True},
        "adapter": {"r": 8, "alpha": 16, "dropout": 0.05},
        "data": {"max_tokens": 256, "validation_rows": 0},
        "optimizer": {"kind": "paged_adamw_32bit", "lr": 1e-4},
        "schedule": {"kind": "constant", "steps": 4, "warmup_steps": 0},
        "batch": {"global_size": 2 * gpus, "micro_size": 1},
        "checkpoint": {"every_steps": 2},
        "strategy": {"kind": "fsdp" if gpus > 1 else "single"},
    }
    whole, broken = RunDir(folder / "whole"), RunDir(folder / "broken")
    qlora("run", write_config(folder, "whole", model, data, gpus, changes))
    config = write_config(folder, "broken", model, data, gpus, changes)
    last = gpus - 1
    # In the third step, a save behind it; then with a part of the base on the GPUs.
    meet(f"accumulation#6@{last}=sigkill", "run", config, code=1)
    meet(f"loading#40@{last}=sigkill", "resume", broken.root, code=1)
    begin = time.monotonic()
    qlora("resume", broken.root)
    seconds = time.monotonic() - begin
    different = differences(whole, broken)
    steps = sum(kind == "train" for kind, _ in records(broken))
    print(
        f"\n{gpus} GPUs, {steps} steps, SIGKILL in the third and again while loading, then "
        f"{seconds:.0f} s to the end: "
        + ("equal to the unbroken run, bit for bit" if not different else "DIFFERENT")
    )
    for line in different[:6]:
        print(f"  {line}")
    return not different


def main():
    """Print both; the exit code says whether the run that was killed ended as the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=["size", "kill"], default=["size", "kill"])
    parser.add_argument("--worlds", nargs="+", type=int, help="numbers of GPUs; by default 2 and 1")
    parser.add_argument("--folder", help="on a disk with 40 GiB; by default a temporary one")
    args = parser.parse_args()
    count = torch.cuda.device_count()
    worlds = args.worlds or [gpus for gpus in (2, 1) if gpus <= count]
    header()
    good = True
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model, cache_dir = write_sparse_base(SHAPE, folder / "base"), folder / "nf4"
        more = {"quantization": {"kind": "nf4", "cache_dir": str(cache_dir)}}
        spec = load_spec(write_config(folder, "cache", model, folder / "none", 1, more))
        begin = time.monotonic()
        path = write_cache(spec, torch.device("cuda"))
        torch.cuda.empty_cache()
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"{SHAPE} in NF4: {size / GIB:.1f} GiB, written in {time.monotonic() - begin:.0f} s")
        if "size" in args.only:
            size_table(folder, cache_dir, model, worlds)
        if "kill" in args.only:
            good = kills(folder, cache_dir, model, max(worlds))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
