"""The plan's account of memory, against steps that are run on tensors without memory."""

import json

import pytest
from gpu_memory import PREDICTIONS, plans

from qlora_dist.plan import make_plan
from qlora_dist.shapes import SHAPES
from qlora_dist.spec_file import spec_from_tree
from tests.fake_step import step_bytes

# The real widths, so that each moment can be the peak.
LAYERS = 3
FULL = {"quantization": {"kind": "none"}, "adapter": {"kind": "none"}}
CASES = {
    "7b, loss": ("llama-7b", {"batch.micro_size": 2, "data.max_tokens": 2048}),
    "7b, short": ("llama-7b", {"adapter.dropout": 0.1}),
    "7b, kept": ("llama-7b", {"model.gradient_checkpointing": False, "adapter.dropout": 0.1}),
    "7b, kept, no dropout": ("llama-7b", {"model.gradient_checkpointing": False}),
    "13b, fp32 constants": ("llama-13b", {"quantization.double": False, "adapter.r": 256}),
    "33b, not quantised": ("llama-33b", {"quantization": {"kind": "none"}, "adapter.dropout": 0.1}),
    "33b, adamw": ("llama-33b", {"optimizer.kind": "adamw", "data.max_tokens": 2048}),
    "65b, bf16 adapter": ("llama-65b", {"adapter.dtype": "bf16", "adapter.dropout": 0.05}),
    "65b, long": ("llama-65b", {"batch.micro_size": 2, "data.max_tokens": 2048}),
    "65b, kept": ("llama-65b", {"model.gradient_checkpointing": False, "data.max_tokens": 2048}),
    "queries and values": ("llama-7b", {"adapter.target": ["q_proj", "v_proj"]}),
    "fp32": ("llama-7b", {"model.dtype": "fp32", "adapter.dropout": 0.1}),
    "fp32, no dropout": ("llama-7b", {"model.dtype": "fp32"}),
    "fp32, kept": (
        "llama-7b",
        {
            "model.dtype": "fp32",
            "model.gradient_checkpointing": False,
            "adapter.dropout": 0.1,
            "data.max_tokens": 2048,
        },
    ),
    "fp32, kept, no dropout": (
        "llama-7b",
        {"model.dtype": "fp32", "model.gradient_checkpointing": False, "data.max_tokens": 2048},
    ),
    "all of 7b": ("llama-7b", FULL),
    "all of 7b, long": ("llama-7b", FULL | {"batch.micro_size": 2, "data.max_tokens": 2048}),
    "all of 7b, kept": ("llama-7b", FULL | {"model.gradient_checkpointing": False}),
    "all of 7b, bf16": ("llama-7b", FULL | {"adapter.dtype": "bf16"}),
    "all of 7b, fp32": ("llama-7b", FULL | {"model.dtype": "fp32"}),
    "eager": ("llama-7b", {"model.attention": "eager", "data.max_tokens": 1024}),
}


def spec_of(name, changes, tmp_path):
    shape = SHAPES[name]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": False,
        **{key: getattr(shape, key) for key in ("vocab_size", "hidden_size", "intermediate_size")},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tree = {
        "name": "x",
        "model": {"source": str(tmp_path)},
        "adapter": {},
        "data": {"source": "x.jsonl", "format": "oasst1", "max_tokens": 512},
        "quantization": {"kind": "nf4"},
        "optimizer": {},
        "schedule": {"steps": 1},
        "batch": {"global_size": 2},
        "strategy": {"kind": "single"},
    }
    for key, value in changes.items():
        section, _, inner = key.partition(".")
        tree[section] = tree[section] | {inner: value} if inner else value
    return spec_from_tree(tree)


def test_what_was_written_down_before_measuring_is_what_the_plan_says(tmp_path):
    """bench/gpu_memory.py compares with the file: `make gpu-memory ARGS=--predict` writes it."""
    assert json.loads(PREDICTIONS.read_text()) == plans(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_the_predicted_peak_is_that_of_a_step(case, tmp_path):
    spec = spec_of(*CASES[case], tmp_path)
    predicted = make_plan(spec).memory
    measured = step_bytes(spec, attention=spec.model.attention.replace("auto", "sdpa"))
    print(f"{case}: {measured:,}, predicted {predicted.peak_bytes / measured - 1:+.2%}")
    assert measured * 0.995 < predicted.peak_bytes < measured * 1.02
