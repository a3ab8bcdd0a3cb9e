"""``make gpu-profile``: where the time of a layer goes, on the GPU and on the host.

Models of few layers and of a few more, so that embedding and loss drop out of the difference. A
batch of 64 tokens keeps the GPU waiting: its time is the host's. Weights are random; with one GPU
only ``single`` runs.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_line import LOGS, header
from gpu_memory import name_of, ready
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from qlora_dist.plan import Topology
from qlora_dist.process import leave
from qlora_dist.shapes import SHAPES
from qlora_dist.train.place import Place
from qlora_dist.train.world import World

FEW, MORE = 2, 6
# As in gpu_memory.py: shape, strategy, sequences x tokens, recomputed, rank, and what else.
ROWS = (
    ("llama-65b", "fsdp", 2, 2048, True, 64, {"dropout": 0.05}),
    ("llama-65b", "fsdp", 1, 64, True, 64, {"dropout": 0.05}),
    ("llama-65b", "single", 2, 2048, True, 64, {"dropout": 0.05}),
    ("llama-65b", "single", 1, 64, True, 64, {"dropout": 0.05}),
    ("llama-7b", "single", 4, 2048, True, 64, {"dropout": 0.1}),
    ("llama-7b", "single", 2, 2048, False, 64, {}),
    ("llama-7b", "single", 1, 64, True, 64, {"dropout": 0.1}),
)
CUDA = torch.cuda.is_available()


def seconds(step):
    """Seconds of a step: the median of seven, after three that warm up."""
    found = []
    for _ in range(10):
        begin = time.perf_counter()
        step()
        if CUDA:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return sorted(found[3:])[3]


def events(step):
    """What a step runs: ``[milliseconds, times, name]`` of kernels and of the host's operators."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=kinds) as found:
        step()
        if CUDA:
            torch.cuda.synchronize()
    averages = found.key_averages()
    # An operator's time on the GPU is that of its kernels, which have rows of their own.
    host = [event for event in averages if event.device_type == DeviceType.CPU]
    kernels = [
        event
        for event in averages
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return {
        "GPU": [[event.self_device_time_total / 1e3, event.count, event.key] for event in kernels],
        "host": [[event.self_cpu_time_total / 1e3, event.count, event.key] for event in host],
    }


def measure(row, world, folder):
    """Milliseconds of a layer, and what the larger model's step runs."""
    whole, times = SHAPES[row[0]], {}
    try:
        for layers in (FEW, MORE):
            SHAPES[row[0]] = whole.model_copy(update={"num_layers": layers})
            _, step = ready(row, world, folder)
            times[layers] = seconds(step)
            ran = events(step)
            del step
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
    finally:
        SHAPES[row[0]] = whole
    layer = (times[MORE] - times[FEW]) / (MORE - FEW)
    return {"layer": layer * 1e3, "all": times[FEW] + layer * (whole.num_layers - FEW), **ran}


def measure_all(rows):
    """What each process of torchrun does; rank 0 prints a line of JSON for each row."""
    place = Place.from_env()
    world = World.start(place, Topology(1, place.size, "cuda" if CUDA else "cpu"), timeout_s=300)
    world.check_sum()
    folder = Path(world.from_rank_0(tempfile.mkdtemp() if world.rank == 0 else ""))
    for row in rows:
        found = measure(row, world, folder)
        if world.rank == 0:
            print(json.dumps([name_of(row), found]), flush=True)
    world.stop()


def show(name, row, found, top):
    """Print a row, and under it what took most."""
    tokens = row[2] * row[3]
    print(
        f"\n{name}: a layer {found['layer']:.2f} ms; a step of all layers about "
        f"{found['all']:.2f} s, {tokens / found['all']:,.0f} tokens/s a GPU"
    )
    for place in ("GPU", "host"):
        ran = sorted(found[place], reverse=True)
        print(f"  {place}: {sum(ms for ms, *_ in ran):.1f} ms in a step of {MORE} layers")
        for ms, times, what in ran[:top]:
            print(f"  {ms:9.2f} ms {times:6d}  {what[:90]}", flush=True)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose names hold one of")
    parser.add_argument("--top", type=int, default=12, help="lines of each table")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure_all(args.measure)
        return 0
    header()
    code = 0
    for size in (1, 2):
        rows = [row for row in ROWS if (row[1] == "single") == (size == 1)]
        rows = {
            name_of(row): row for row in rows if any(text in name_of(row) for text in args.only)
        }
        if not rows or torch.cuda.device_count() < size:
            continue
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={size}", __file__]
        command += ["--measure", json.dumps(list(rows.values()))]
        with (LOGS / "gpu_profile.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            for line in process.stdout:
                if line.startswith('["'):
                    name, found = json.loads(line)
                    show(name, rows[name], found, args.top)
            code = process.wait() or code
    return code


if __name__ == "__main__":
    leave(main())
