"""Run by torchrun: steps under fsdp on CPUs, counted as a GPU's allocator would count them.

The last line is JSON: for each, the bytes before it, at its peak, and what the plan says of both.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch
from random_base import fill_random
from transformers import LlamaConfig

from qlora_dist.plan import Topology, make_plan
from qlora_dist.process import leave
from qlora_dist.spec_file import spec_from_tree
from qlora_dist.train.adapters import trainable
from qlora_dist.train.load import empty_base
from qlora_dist.train.method import dtype_of_weights, make_trainable
from qlora_dist.train.place import Place
from qlora_dist.train.strategy import Sharded
from qlora_dist.train.world import World
from tests.fake_step import Held, forward_and_backward, kernels_without_memory

# Bytes that a GPU has beside what is counted here.
NOT_COUNTED = ("workspaces",)


def make_spec(folder, *, tokens, vocabulary, recompute, trained):
    """A small LLaMA's run on two GPUs."""
    LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    ).save_pretrained(folder)
    tree = {
        "name": "step",
        "model": {"source": str(folder), "gradient_checkpointing": recompute},
        "quantization": {"kind": "none" if trained == "all" else "nf4"},
        "adapter": {"kind": "none"} if trained == "all" else {"r": 64 if trained == "rows" else 8},
        "data": {"source": "none", "format": "input-output", "max_tokens": tokens},
        "optimizer": {"kind": "paged_adamw_32bit"},
        "schedule": {"steps": 1},
        "batch": {"global_size": 2, "micro_size": 1},
        "strategy": {"kind": "fsdp", "shard_adapter": trained == "rows"},
        "resources": {"gpus_per_node": 2, "gpu": "h100-80gb"},
    }
    return spec_from_tree(tree)


def count(spec, world):
    """Bytes of all tensors before a step, and the most that there were at once in it."""
    device, strategy = world.device, Sharded(world, spec)
    with Held() as held, kernels_without_memory():
        dtype = dtype_of_weights(spec)
        base = empty_base(spec, attention="sdpa", share=strategy.share, dtype=dtype)
        model, _ = make_trainable(base.model, spec, device=device)
        strategy.shard(base.model, trainable(model))
        fill_random(base, spec, device=device, put=strategy.put, share=strategy.share)
        # Optimizers keep references to what is stepped, and to its gradients.
        trained = strategy.train(trainable(model))
        gc.collect()
        before = held.peak = held.bytes()
        forward_and_backward(model, spec, torch.bfloat16, device)
        del trained
        return before, held.peak


def measure(world, *, tokens, vocabulary, recompute, trained):
    """Count a step, and what the plan says of it."""
    with tempfile.TemporaryDirectory() as name:
        spec = make_spec(
            Path(name),
            tokens=int(tokens),
            vocabulary=int(vocabulary),
            recompute=recompute == "yes",
            trained=trained,
        )
        before, peak = count(spec, world)
        memory = make_plan(spec).memory
    state = ("weights", "quantisation", "adapter", "gradients")
    said = {
        "before": sum(c.bytes for c in memory.components if c.name.startswith(state)),
        "peak": memory.peak_bytes
        - sum(c.bytes for c in memory.components if c.name in NOT_COUNTED),
    }
    return {"before": before, "peak": peak, "said": said, "moment": memory.moment}


def main(*cases):
    """Count steps, each ``TOKENS,VOCABULARY,RECOMPUTE,TRAINED``, and compare with the plan."""
    place = Place.from_env()
    world = World.start(place, Topology(1, place.size, "cpu"), timeout_s=100)
    keys = ("tokens", "vocabulary", "recompute", "trained")
    found = {
        case: measure(world, **dict(zip(keys, case.split(","), strict=True))) for case in cases
    }
    if world.rank == 0:
        print(json.dumps(found))
    world.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
