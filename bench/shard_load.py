"""Loading a base in NF4 on all ranks at once: ours, by rows, or transformers', whole on each.

Run by torchrun. The last line is JSON: seconds, the largest GPU peak, and the largest anonymous
host memory of any rank. Imports and the process group are outside the time.
"""

import argparse
import json
import threading
import time
from pathlib import Path

import accelerate  # noqa: F401 - outside the time
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - outside the time

from qlora_dist.plan import Topology
from qlora_dist.process import leave
from qlora_dist.sizes import GIB
from qlora_dist.spec_file import spec_from_tree
from qlora_dist.train.load import empty_base, fill_base
from qlora_dist.train.place import Place
from qlora_dist.train.strategy import Replicated, Sharded, Single
from qlora_dist.train.world import World


class HostMemory:
    """Samples this process's anonymous memory, from a thread."""

    def __init__(self):
        self.most = 0
        self._before = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            self.most = max(self.most, self._now() - self._before)
            time.sleep(0.02)

    def _now(self):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return 0


def make_spec(folder, kind):
    """The least that names a model and a strategy."""
    tree = {
        "name": "load",
        "model": {"source": str(folder)},
        "adapter": {"r": 8},
        "data": {"source": "none", "format": "input-output", "max_tokens": 64},
        "optimizer": {"lr": 1e-3},
        "schedule": {"steps": 3},
        "strategy": {"kind": kind},
    }
    return spec_from_tree(tree, source="shard_load")


def load_ours(spec, world):
    """By rows, as a run does it."""
    kinds = {"single": Single, "ddp": Replicated, "fsdp": Sharded}
    strategy = kinds[spec.strategy.kind](world)
    base = empty_base(spec, attention="sdpa", share=strategy.share)
    strategy.shard(base.model, {})
    fill_base(
        base,
        spec,
        device=world.device,
        share=strategy.share,
        gather=world.gather_rows if strategy.share.size > 1 else lambda rows: rows,
        put=strategy.put,
    )
    return base.model


def load_theirs(spec, world):
    """As transformers, PEFT and their users do it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # A base in NF4 says itself how it was quantised.
    quantised = (Path(spec.model.source) / "manifest.json").exists()
    return AutoModelForCausalLM.from_pretrained(
        spec.model.source,
        dtype=torch.bfloat16,
        device_map={"": world.device},
        **({} if quantised else {"quantization_config": config}),
    )


def main():
    """Load once, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--how", choices=["single", "ddp", "fsdp", "transformers"], required=True)
    args = parser.parse_args()
    place = Place.from_env()
    cuda = torch.cuda.is_available()
    topology = Topology(1, place.size, "cuda" if cuda else "cpu")
    world = World.start(place, topology, timeout_s=600)
    world.check_sum()
    spec = make_spec(args.model, "single" if args.how == "transformers" else args.how)
    load = load_theirs if args.how == "transformers" else load_ours
    memory = HostMemory()
    world.barrier()
    begin = time.monotonic()
    model = load(spec, world)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.monotonic() - begin
    held, peak = 0.0, 0.0
    if cuda:
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    rows = world.gather([seconds, held, peak, memory.most])
    seconds, held, peak, host = (max(column) for column in zip(*rows, strict=True))
    if world.rank == 0:
        facts = {"seconds": seconds, "held_gib": held / GIB, "peak_gib": peak / GIB}
        print(json.dumps(facts | {"host_gib": host / GIB}), flush=True)
    del model
    world.stop()
    return 0


if __name__ == "__main__":
    leave(main())
