"""``make gpu-shard``: sharded NF4 on two GPUs, its bytes, losses, loading and speed.

transformers' own loading stands beside ours, on the same files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_line import LOGS, header, measure, qlora, write_config
from models import make_model, make_rows

from qlora_dist.layout import RunDir
from qlora_dist.train.compare import differences, records

BENCH = Path(__file__).parent
STEPS = 20


def torchrun(script, processes, *arguments):
    """Run a script on so many GPUs; the JSON of its last line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", str(BENCH / script), *map(str, arguments)]
    path = os.pathsep.join([str(BENCH.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    with (LOGS / "gpu_shard.log").open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}\n{done.stderr}\n")
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bytes_table(worlds):
    """Bytes that a rank computes with; returns whether none differs, and one flipped bit does."""
    print("\nbytes that ranks compute with, against bitsandbytes on one device")
    print("GPUs  what                                 compared  different")
    good = True
    rows = {
        "nested constants": [],
        "nested, recomputed": ["--recompute"],
        "fp32 constants": ["--single"],
        "fp32 weights": ["--dtype", "fp32"],
        "one bit flipped on purpose": ["--damage"],
    }
    for name, arguments in rows.items():
        found = torchrun("shard_bytes.py", max(worlds), *arguments)
        good &= (found["different"] > 0) == ("--damage" in arguments)
        print(
            f"{max(worlds):>4}  {name:<28}  {found['compared']:>15,}  {found['different']:>9,}",
            flush=True,
        )
    return good


def loss_table(folder, worlds):
    """20 steps of fsdp on two GPUs beside ddp on two, and single on one."""
    model = make_model(folder / "small", "llama-7b", num_layers=4)
    data = make_rows(folder / "rows.jsonl", num_rows=200, lines_per_row=20)
    changes = {
        "model": {"gradient_checkpointing": True},
        "adapter": {"r": 64, "alpha": 16, "dropout": 0.0},
        "data": {"max_tokens": 512, "validation_rows": 0},
        "optimizer": {"kind": "paged_adamw_32bit", "lr": 2e-4},
        "schedule": {"kind": "constant", "steps": STEPS, "warmup_steps": 0},
        "checkpoint": {"every_steps": 100},
    }
    runs = {}
    for kind, gpus in (("single", 1), *(("ddp", n) for n in worlds[1:]), ("fsdp", max(worlds))):
        if kind == "fsdp" and gpus == 1:
            continue
        more = {"strategy": {"kind": kind}}
        path = write_config(folder, f"loss-{kind}", model, data, gpus, changes | more)
        qlora("run", path)
        runs[kind] = RunDir(folder / path.stem)
    print(
        f"\n{STEPS} steps, 4 layers of LLaMA-7B's shape, dropout 0, bf16, recomputed, paged AdamW"
    )
    good = True
    if "fsdp" in runs:
        different = differences(runs["ddp"], runs["fsdp"])
        good = not different
        print(f"fsdp is ddp on {max(worlds)} GPUs, bit for bit: {'NO' if different else 'yes'}")
        for line in different[:5]:
            print(f"    {line}")
        worst = worst_difference(runs["single"], runs["fsdp"])
        print(f"fsdp on {max(worlds)} GPUs and single on one: losses within {worst:.1e} relative")
    return good


def worst_difference(left, right):
    """Largest relative difference of two runs' losses."""
    ours, theirs = records(left), records(right)
    return max(
        abs(float.fromhex(ours[key]["loss"]) / float.fromhex(theirs[key]["loss"]) - 1)
        for key in ours
        if key[0] == "train"
    )


def load_table(folder, worlds, shape):
    """Loading from 16 bits, ours beside transformers'."""
    model = make_model(folder / "base", shape)
    print(f"\nloading {shape} from bf16 in a warm page cache, {max(worlds)} ranks at once")
    print("how            seconds  held GiB  GPU peak GiB  anonymous host GiB")
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(64 << 20):
                pass
    sharded = "fsdp" if len(worlds) > 1 else "single"
    for how in (sharded, "transformers", sharded):
        load_row(model, how, max(worlds))
    more = {"quantization": {"kind": "nf4", "cache_dir": str(folder / "nf4")}}
    path = write_config(folder, "quantize", model, folder / "none", 1, more)
    begin = time.monotonic()
    qlora("quantize", path)
    print(f"the same from NF4, which `qlora quantize` wrote in {time.monotonic() - begin:.0f} s")
    (cache,) = (folder / "nf4").iterdir()
    for how in (sharded, "transformers", sharded):
        load_row(cache, how, max(worlds))


def load_row(model, how, processes):
    """One load, by all ranks at once."""
    found = torchrun("shard_load.py", processes, "--model", model, "--how", how)
    print(
        f"{how:<13}  {found['seconds']:>7.2f}  {found['held_gib']:>8.2f}  "
        f"{found['peak_gib']:>12.2f}  {found['host_gib']:>18.2f}",
        flush=True,
    )


def size_table(folder, worlds):
    """Speed and peak of runs of LLaMA-7B's shape beside their plan."""
    model = make_model(folder / "large", "llama-7b")
    data = make_rows(folder / "long.jsonl", num_rows=200, lines_per_row=150)
    changes = {
        "deterministic": False,
        "adapter": {"r": 64, "alpha": 16, "dropout": 0.0},
        "data": {"max_tokens": 2048, "validation_rows": 0},
        "model": {"gradient_checkpointing": True},
        "optimizer": {"kind": "paged_adamw_32bit", "lr": 2e-4},
        "schedule": {"kind": "constant", "steps": 8, "warmup_steps": 0},
        "batch": {"global_size": 8, "micro_size": 4},
        "checkpoint": {"every_steps": 100},
    }
    print("\nLLaMA-7B shape, random weights, NF4 with double quantisation, r = 64")
    print("GPUs  what                            tokens/s  peak GiB  plan GiB   plan off by")
    for kind in ("ddp", "fsdp") if len(worlds) > 1 else ("single",):
        more = {"strategy": {"kind": kind}}
        label = f"{kind}, 4 x 2048, recomputed"
        measure(folder, model, data, max(worlds), changes | more, label)


def main():
    """Print the tables; the exit code says whether every check passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=["bytes", "loss", "load", "size"])
    parser.add_argument("--folder", help="where models are written; by default a temporary one")
    parser.add_argument("--shape", default="llama-33b", help="of the model that is loaded")
    args = parser.parse_args()
    worlds = [1, 2][: torch.cuda.device_count()]
    parts = args.only or ["bytes", "loss", "load", "size"]
    header()
    good = True
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if "bytes" in parts:
            good &= bytes_table(worlds)
        if "loss" in parts:
            good &= loss_table(folder, worlds)
        if "size" in parts:
            size_table(folder, worlds)
        if "load" in parts:
            load_table(folder, worlds, args.shape)
    print("all checks passed" if good else "NOT all checks passed", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
