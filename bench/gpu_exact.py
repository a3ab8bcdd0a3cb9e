"""``make gpu-exact``: what exact data and checkpoints cost on a GPU.

How long training waits for a save at the size of a 65B QLoRA state; useful tokens a second of
padded, length-grouped and packed batches; and a run that is killed twice, and compared with the
unbroken one.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_line import header, qlora, write_config
from models import make_model, make_rows

from qlora_dist.data.build import ensure_store
from qlora_dist.data.corpus import Corpus
from qlora_dist.data.schedule import corpus_facts, make_schedule
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.layout import RunDir
from qlora_dist.plan import attention_of
from qlora_dist.shapes import SHAPES
from qlora_dist.sizes import GIB
from qlora_dist.spec_file import load_spec
from qlora_dist.train.adapters import add_adapter, trainable
from qlora_dist.train.batch import make_batch
from qlora_dist.train.checkpoint import Part, TrainState
from qlora_dist.train.compare import differences, records
from qlora_dist.train.load import load_base
from qlora_dist.train.log import Metrics
from qlora_dist.train.objective import summed_loss
from qlora_dist.train.optimizer import make_optimizer
from qlora_dist.train.saver import Saver
from qlora_dist.train.trained import Whole
from qlora_dist.train.world import World

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DATA = ROOT.parent / "shared" / "data" / "oasst1_validation_dialogs.jsonl"


def adapter_like(shape_name, r):
    """Random parameters of the adapter's shapes on all linear layers, float32, on the device."""
    shape = SHAPES[shape_name]
    return {
        f"layers.{layer}.{name}.{part}": torch.nn.Parameter(torch.randn(size, device=DEVICE))
        for layer in range(shape.num_layers)
        for name, (rows, cols) in shape.linears.items()
        for part, size in (("lora_A", (r, cols)), ("lora_B", (rows, r)))
    }


def work_rate(seconds):
    """Matrix products a second that the device does, for so long or until a save has ended."""
    left = torch.randn(4096 if DEVICE.type == "cuda" else 64, device=DEVICE).diag()
    count, begin = 0, time.monotonic()
    while time.monotonic() - begin < seconds:
        for _ in range(20):
            left @ left
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        count += 20
    return count / (time.monotonic() - begin)


def save_table(folder, shape_name):
    """Training waits for the copy off the device, and for nothing else of a save."""
    print(f"\nSaves of a {shape_name} adapter, r = 64, float32, two moments")
    print(
        "optimizer           parameters  state GiB  prepared s  waits s, two saves  written s  "
        "work meanwhile"
    )
    for kind in ("adamw", "paged_adamw_32bit"):
        changes = [f"optimizer.kind={kind}", f"run_dir={folder / kind}"]
        spec = load_spec(ROOT / "configs" / "guanaco-65b.yaml", changes)
        run = RunDir(folder / kind)
        run.root.mkdir()
        world = World(0, 1, DEVICE)
        parameters = adapter_like(shape_name, 64)
        trained = Whole(parameters, world, world)
        optimizer = make_optimizer(spec.optimizer, trained.stepped)
        trained.begin(torch.nn.Module(), optimizer)
        for parameter in parameters.values():
            parameter.grad.copy_(parameter.detach()).mul_(1e-3)
        optimizer.step()
        said = []
        metrics = Metrics(run.metrics, world, 0)
        part = Part(
            run=run,
            attempt=0,
            spec=spec,
            world=world,
            trained=trained,
            target_modules=[],
            corpus_sha256="",
            say=said.append,
        )
        saver = Saver(part, metrics, TrainState())
        begin = time.monotonic()
        saver.prepare()
        prepared = time.monotonic() - begin
        alone = work_rate(2.0)
        waits = []
        for step in (1, 2):
            begin = time.monotonic()
            saver.start(TrainState(step=step))
            waits.append(time.monotonic() - begin)
            meanwhile = work_rate(2.0)
            saver.poll(wait=True)
        count = sum(p.numel() for p in parameters.values())
        written = said[-1].partition("after ")[2].partition(" s")[0]
        print(
            f"{kind:<18}  {count:>10,}  {3 * 4 * count / GIB:>9.2f}  {prepared:>10.2f}  "
            f"{waits[0]:>8.2f}  {waits[1]:>8.2f}  {written:>9}  {meanwhile / alone:>14.0%}",
            flush=True,
        )
        del optimizer, parameters, part, saver, trained


def packing_table(folder, args):
    """Useful tokens a second of the three ways to make batches, with one model."""
    source = make_model(folder / "model", args.packing_shape, tokenizer=args.tokenizer)
    ways = {
        "padded": {},
        "grouped by length": {"data": {"group_by_length": True}},
        "packed": {"data": {"packing": True}},
        "packed, masked sdpa": {"data": {"packing": True}, "model": {"attention": "sdpa"}},
    }
    print(
        f"\n{args.packing_shape} shape, NF4, r = 64, recomputed, {args.data.name}, at most "
        f"{args.tokens} tokens, {args.rows} sequences a batch"
    )
    print("batches               useful of a batch  useful tokens/s  ratio  peak GiB")
    first = None
    for label, changes in ways.items():
        base = {
            "data": {"source": str(args.data), "format": "oasst1", "max_tokens": args.tokens},
            "model": {"source": str(source), "gradient_checkpointing": True},
            "adapter": {"r": 64, "alpha": 16, "dropout": 0.0},
            "batch": {"global_size": args.rows, "micro_size": args.rows},
            "resources": {"gpus_per_node": int(DEVICE.type == "cuda")},
        }
        merged = {k: base.get(k, {}) | changes.get(k, {}) for k in base}
        spec = load_spec(write_config(folder, "packing", source, args.data, 1, merged))
        store = ensure_store(spec, load_tokenizer(spec), folder / "corpora")
        speed, peak = steps_a_second(spec, Corpus(store), args.batches)
        first = first or speed
        print(
            f"{label:<20}  {corpus_facts(spec, Corpus(store)).useful:>17.1%}  {speed:>15,.0f}  "
            f"{speed / first:>5.2f}  {peak / GIB:>8.2f}",
            flush=True,
        )


def steps_a_second(spec, corpus, num_batches):
    """Useful tokens a second of forward and backward passes, and the peak in bytes."""
    # PEFT's wrappers point at each other: the last model goes only when it is collected.
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    attention = attention_of(spec)
    base = load_base(spec, device=DEVICE, attention=attention)
    model = add_adapter(base, spec.adapter, seed=0, device=DEVICE, autocast=True)
    model.train()
    parameters = trainable(model)
    size = spec.batch.micro_size
    order = make_schedule(spec, corpus).samples(0, size * num_batches).reshape(-1, size)
    # The same way through the epoch for all: neither the longest nor the shortest alone.
    order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0)).numpy()]
    cuda = DEVICE.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    warm = 2
    for number, rows in enumerate(order):
        if number == warm:
            if cuda:
                torch.cuda.synchronize()
            begin = time.monotonic()
        batch = make_batch(
            [corpus.documents(i) for i in rows],
            flat=attention == "varlen",
            pad_id=0,
            device=DEVICE,
        )
        with torch.autocast(DEVICE.type, torch.bfloat16):
            (summed_loss(model, batch) / 1000).backward()
        for parameter in parameters.values():
            parameter.grad = None
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - begin
    return corpus.lengths[order[warm:]].sum() / seconds, (
        torch.cuda.max_memory_allocated() if cuda else 0
    )


def kills(folder):
    """One GPU, deterministic, packed: two kills in an epoch, and the unbroken run."""
    model = make_model(folder / "small", "smollm2-135m", num_layers=4)
    data = make_rows(folder / "rows.jsonl", num_rows=120, lines_per_row=5)
    changes = {
        "data": {"packing": True, "max_tokens": 512, "validation_rows": 16},
        "batch": {"global_size": 4, "micro_size": 2},
        "checkpoint": {"every_steps": 2},
        "optimizer": {"kind": "paged_adamw_8bit", "lr": 1e-3},
        "resources": {"gpus_per_node": int(DEVICE.type == "cuda")},
    }
    whole, broken = RunDir(folder / "whole"), RunDir(folder / "broken")
    qlora("run", write_config(folder, "whole", model, data, 1, changes))
    config = write_config(folder, "broken", model, data, 1, changes)
    meet("accumulation#6=sigkill", "run", config, code=1)
    meet("save-write#1=sigterm", "resume", broken.root, code=85)
    qlora("resume", broken.root)
    different = differences(whole, broken)
    steps = sum(kind == "train" for kind, _ in records(broken))
    print(
        f"\npacked, deterministic, paged 8-bit AdamW, {steps} steps, SIGKILL and SIGTERM: "
        + ("equal to the unbroken run, bit for bit" if not different else "DIFFERENT")
    )
    for line in different[:6]:
        print(f"  {line}")
    return not different


def meet(fault, *arguments, code):
    """A command that meets a fault."""
    os.environ["QLORA_FAULT"] = fault
    try:
        qlora(*arguments, code=code)
    finally:
        del os.environ["QLORA_FAULT"]


def main():
    """Print the tables; the exit code says whether the killed run is the unbroken one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["save", "packing", "kills"])
    parser.add_argument("--data", type=Path, default=DATA, help="OASST1 dialogs, one a line")
    parser.add_argument("--tokenizer", type=Path, help="folder of a real tokenizer")
    parser.add_argument("--save-shape", default="llama-65b")
    parser.add_argument("--packing-shape", default="llama-7b")
    parser.add_argument("--batches", type=int, default=14)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    good = True
    header()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only in (None, "save"):
            save_table(folder, args.save_shape)
        if args.only in (None, "packing"):
            packing_table(folder, args)
        if args.only in (None, "kills"):
            good = kills(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
