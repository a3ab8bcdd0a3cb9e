"""``make gpu-memory``: the plan's peak memory beside the measured one, over many configurations.

Predictions are written first, and committed (``--predict`` writes bench/memory_predictions.json);
measuring reads them. Each configuration is five optimizer steps of the longest batch, one of whose
sequences is a token shorter so that padding needs its mask; the last three are timed. Weights are
random.
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gpu_line import LOGS, header
from random_base import fill_random, write_config_of
from torch.distributed.tensor import DTensor

from qlora_dist.data.tokens import Sample
from qlora_dist.plan import Topology, attention_of, make_plan
from qlora_dist.process import leave
from qlora_dist.sizes import GIB
from qlora_dist.spec import LoraAdapter
from qlora_dist.spec_file import spec_from_tree
from qlora_dist.train.adapters import trainable
from qlora_dist.train.batch import make_batch
from qlora_dist.train.load import empty_base
from qlora_dist.train.method import dtype_of_weights, make_trainable
from qlora_dist.train.objective import summed_loss
from qlora_dist.train.optimizer import make_optimizer
from qlora_dist.train.place import Place
from qlora_dist.train.strategy import STRATEGIES
from qlora_dist.train.world import World

PREDICTIONS = Path(__file__).parent / "memory_predictions.json"
# shape, strategy, sequences x tokens, recomputed, rank of the adapter, and what else.
CHOSEN = (
    ("llama-7b", "single", 1, 528, True, 64, {}),
    ("llama-7b", "single", 4, 2048, True, 64, {"dropout": 0.1}),
    ("llama-7b", "single", 2, 2048, False, 64, {}),
    ("llama-7b", "ddp", 2, 1024, False, 16, {"dropout": 0.1}),
    ("llama-7b", "fsdp", 4, 2048, True, 64, {}),
    ("llama-13b", "single", 2, 1024, True, 64, {"optimizer": "adamw"}),
    ("llama-13b", "fsdp", 2, 2048, False, 64, {}),
    ("llama-33b", "single", 1, 2048, True, 64, {"dropout": 0.05}),
    ("llama-33b", "fsdp", 2, 2048, True, 16, {}),
    ("llama-65b", "single", 1, 512, True, 64, {"dtype": "bf16", "dropout": 0.05}),
    ("llama-65b", "single", 1, 512, True, 64, {"dropout": 0.05}),
    ("llama-65b", "fsdp", 2, 2048, True, 64, {"dropout": 0.05}),
    ("llama-13b", "fsdp", 2, 2048, True, 64, {"rows": True}),
    ("llama-7b", "fsdp", 1, 2048, True, 0, {"full": True, "optimizer": "adamw"}),
    (
        "llama-7b",
        *("single", 1, 1024, True, 0),
        {"full": True, "dtype": "bf16", "optimizer": "adamw_8bit"},
    ),
)
NUM_DRAWN = 6


def drawn(seed):
    """Further configurations, all of which the plan says fit into 80 GB."""
    rng, found = random.Random(seed), []
    while len(found) < NUM_DRAWN:
        row = (
            rng.choice(["llama-7b", "llama-13b", "llama-33b", "llama-65b", "llama-2-70b"]),
            rng.choice(["single", "ddp", "fsdp"]),
            rng.choice([1, 2, 3, 4]),
            rng.choice([384, 512, 1024, 1536, 2048]),
            rng.random() < 0.6,
            rng.choice([8, 16, 64, 128]),
            {
                "dropout": rng.choice([0.0, 0.05]),
                "dtype": rng.choice(["fp32", "bf16"]),
                "double": rng.random() < 0.7,
                "optimizer": rng.choice(["adamw", "adamw_8bit", "paged_adamw_32bit"]),
            },
        )
        with tempfile.TemporaryDirectory() as folder:
            if make_plan(spec_of(row, Path(folder))).memory.fits:
                found.append(row)
    return found


def spec_of(row, folder):
    """The spec of a configuration."""
    shape, strategy, rows, tokens, recompute, r, more = row
    world = 1 if strategy == "single" else 2
    adapter = {
        "r": r,
        "alpha": 16,
        "dropout": more.get("dropout", 0.0),
        "dtype": more.get("dtype", "fp32"),
    }
    quantization = {"kind": "nf4", "double": more.get("double", True)}
    if more.get("full"):
        adapter = {"kind": "none", "dtype": more.get("dtype", "fp32")}
        quantization = {"kind": "none"}
    tree = {
        "name": "memory",
        "model": {
            "source": str(folder / shape),
            "shape": shape,
            "gradient_checkpointing": recompute,
        },
        "quantization": quantization,
        "adapter": adapter,
        "data": {"source": "none", "format": "input-output", "max_tokens": tokens},
        "optimizer": {"kind": more.get("optimizer", "paged_adamw_32bit")},
        "schedule": {"steps": 2},
        "batch": {"global_size": rows * world, "micro_size": rows},
        "strategy": {"kind": strategy, "shard_adapter": more.get("rows", False)},
        "resources": {"gpus_per_node": world, "gpu": "h100-80gb"},
    }
    return spec_from_tree(tree, source="gpu_memory")


def name_of(row):
    """A configuration in a few words."""
    shape, strategy, rows, tokens, recompute, r, more = row
    kept = "recomputed" if recompute else "kept"
    rest = " ".join(f"{key}={value}" for key, value in more.items())
    return f"{shape} {strategy} {rows} x {tokens} {kept} r={r} {rest}".strip()


def predict():
    """Write what the plan says of the chosen configurations."""
    with tempfile.TemporaryDirectory() as folder:
        PREDICTIONS.write_text(json.dumps(plans(Path(folder)), indent=1) + "\n", encoding="utf-8")


def plans(folder):
    """Peak bytes and their moment, for each chosen configuration by name."""
    memories = {name_of(row): make_plan(spec_of(row, folder)).memory for row in CHOSEN}
    return {name: [memory.peak_bytes, memory.moment] for name, memory in memories.items()}


def ready(row, world, folder):
    """A configuration's model, made: bytes of its weights, and a function that does a step."""
    spec, device = spec_of(row, folder), world.device
    if world.rank == 0:
        write_config_of(row[0], folder / row[0])
    world.barrier()
    spec = make_plan(spec).spec
    strategy = STRATEGIES[spec.strategy.kind](world, spec)
    attention, dtype = attention_of(spec), dtype_of_weights(spec)
    base = empty_base(spec, attention=attention, share=strategy.share, dtype=dtype)
    model, _ = make_trainable(base.model, spec, device=device)
    strategy.shard(base.model, trainable(model))
    fill_random(base, spec, device=device, put=strategy.put, share=strategy.share)
    weights = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if isinstance(spec.adapter, LoraAdapter):
        weights -= sum(local(p).nbytes for p in trainable(model).values())
    trained = strategy.train(trainable(model))
    optimizer = make_optimizer(spec.optimizer, trained.stepped)

    def step():
        trained.zero()
        rows = [[sample(spec.data.sequence_tokens - (i == 1))] for i in range(row[2])]
        batch = make_batch(rows, flat=False, pad_id=0, device=device)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            loss = summed_loss(model, batch) / 1000
        loss.backward()
        trained.reduce()
        trained.clip(0.3)
        optimizer.step()
        trained.spread()

    return weights, step


def local(parameter):
    """What a process has of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def measure(row, world, folder):
    """Peak bytes of steps, what is held before them, and seconds of one; the most of a rank."""
    gc.collect()
    cuda = world.device.type == "cuda"
    weights, step = ready(row, world, folder)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if cuda else 1
    found = world.gather([peak, weights, statistics.median(seconds[2:])])
    return [max(column) for column in zip(*found, strict=True)]


def sample(length):
    """A sequence of random tokens, all learned."""
    ids = np.random.default_rng(0).integers(3, 2000, length)
    return Sample(ids, np.ones(length, bool), source_cut=False, target_cut=False)


def measure_all(rows):
    """What each process of torchrun does; rank 0 prints a line of JSON for each configuration."""
    place = Place.from_env()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = World.start(place, Topology(1, place.size, device), timeout_s=300)
    world.check_sum()
    name = tempfile.mkdtemp() if world.rank == 0 else ""
    folder = Path(world.from_rank_0(name))
    for row in rows:
        found = measure(row, world, folder)
        if world.rank == 0:
            print(json.dumps([name_of(row), *found]), flush=True)
    world.stop()


def lines_of(rows, size):
    """What torchrun's processes print of some configurations, as they print it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={size}", __file__, "--measure", json.dumps(rows)]
    # As the launcher has it: else a block may be a MiB larger than what it is for.
    env = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    with (LOGS / "gpu_memory.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        for line in process.stdout:
            if line.startswith('["'):
                yield json.loads(line)
        process.wait()


def table(rows):
    """Print what was predicted and what was measured; returns whether all is within the goal."""
    print("\ntokens/s of a GPU, and GiB: of weights, and the peak of torch's allocator")
    print(f"{'configuration':<66}  tokens/s  weights  measured  predicted  off by")
    good, missing = True, {name_of(row): row for row in rows}
    for size in (1, 2):
        own = [row for row in rows if (row[1] == "single") == (size == 1)]
        # One that does not fit ends its processes: the rest gets new ones.
        while own:
            for name, peak, weights, seconds in lines_of(own, size):
                row = missing.pop(name)
                off, speed = predicted(row) / peak - 1, row[2] * row[3] / seconds
                good &= -0.02 <= off <= 0.05
                print(
                    f"{name:<66}  {speed:>8,.0f}  {weights / GIB:>7.2f}  {peak / GIB:>8.2f}  "
                    f"{peak * (1 + off) / GIB:>9.2f}  {off:>+6.1%}",
                    flush=True,
                )
            own = [row for row in own if name_of(row) in missing]
            if own:
                print(f"{name_of(own[0]):<66}  did not end", flush=True)
                missing.pop(name_of(own.pop(0)))
                good = False
    return good


def predicted(row):
    """Bytes that were predicted before, or are now of a configuration that was drawn."""
    before = json.loads(PREDICTIONS.read_text(encoding="utf-8")).get(name_of(row))
    if before is not None:
        return before[0]
    with tempfile.TemporaryDirectory() as folder:
        return make_plan(spec_of(row, Path(folder))).memory.peak_bytes


def main():
    """Predict, or measure; the exit code says whether every prediction was within the goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--seed", type=int, help="also configurations that are drawn from it")
    parser.add_argument("--only", nargs="+", default=[""], help="those whose names hold one of")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.predict:
        predict()
        return 0
    if args.measure is not None:
        measure_all(args.measure)
        return 0
    header()
    rows = [row for row in CHOSEN if any(text in name_of(row) for text in args.only)]
    if args.seed is not None:
        rows += drawn(args.seed)
    if torch.cuda.device_count() < 2:
        rows = [row for row in rows if row[1] == "single"]
    good = table(rows)
    print("all predictions within -2 % and +5 %" if good else "NOT all predictions within the goal")
    return 0 if good else 1


if __name__ == "__main__":
    leave(main())
