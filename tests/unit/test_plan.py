"""What a plan derives and refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_dist.errors import PlanError
from qlora_dist.plan import make_plan, plan_length
from qlora_dist.shapes import SHAPES
from qlora_dist.sizes import GIB, nf4_bytes
from qlora_dist.spec_file import load_spec, spec_from_tree
from tests.unit.test_spec import GOOD

CONFIGS = Path(__file__).parents[2] / "configs"


def plan(*overrides):
    return make_plan(spec_from_tree(GOOD, overrides))


def test_a_batch_is_shared_out_over_processes_and_time():
    result = plan(
        "strategy.kind=ddp", "resources.gpus_per_node=2", "batch={global_size: 16, micro_size: 2}"
    )
    assert result.topology.world_size == 2
    assert result.batch.accumulation == 4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["batch.global_size=10", "batch.micro_size=4"],
            "10 sequences do not divide into 1 processes x 4 (micro_size); use 8 or 12",
        ),
        (["batch.global_size=1", "batch.micro_size=4"], "use 4, or another micro_size"),
        (["resources.gpus_per_node=2"], "single is one process, and there are 2; use ddp"),
        (["strategy.kind=fsdp"], "fsdp shards over several processes, and there is 1; use single"),
        (["strategy.kind=hsdp"], "use single"),
        (["resources.nodes=2", "strategy.kind=ddp"], "2 nodes need backend: slurm"),
        (["resources.processes_per_node=2"], "is for runs without GPUs"),
        (["resources.gpu=h100"], "Did you mean h100-80gb?"),
        (["data.max_tokens=4096"], "use max_tokens: 2048"),
        (["adapter={kind: none}"], "use quantization.kind=none, or adapter.kind=lora"),
        (
            ["adapter={kind: none, dtype: bf16}", "quantization={kind: none}", "model.dtype=fp32"],
            "use model.dtype=bf16",
        ),
        (
            [
                *("strategy.kind=zero3", "resources.gpus_per_node=2"),
                *("optimizer.kind=paged_adamw_8bit", "adapter.dtype=bf16"),
            ],
            "zero3 steps all weights as one row of numbers, cut anywhere; use paged_adamw_32bit",
        ),
        (
            ["strategy.kind=zero2", "resources.gpus_per_node=2", "adapter.dtype=bf16"],
            "use adapter.dtype=fp32",
        ),
        (["strategy.shard_adapter=true"], "is for adapters under fsdp and hsdp, not with"),
        (
            [
                *("adapter={kind: none}", "quantization={kind: none}", "strategy.kind=fsdp"),
                *("strategy.shard_adapter=true", "resources.gpus_per_node=2"),
            ],
            "full fine-tuning has no adapter",
        ),
        (
            [
                *("adapter={kind: none}", "quantization={kind: none}", "strategy.kind=fsdp"),
                *("optimizer.kind=adamw_8bit", "resources.gpus_per_node=2"),
            ],
            "use paged_adamw_32bit",
        ),
        (["adapter.target=[q_prj]"], "Did you mean q_proj?"),
        (["adapter.target=[q_proj, q_proj]"], "names a layer twice"),
        (["schedule.warmup_steps=10"], "use at most 9"),
        ([f"model.source={'x' * 300}/y"], "model.source"),
        (["model.source=nobody/nothing"], "a plan asks no network"),
        (["model.shape=llama-8b"], "known: llama-7b"),
        (
            ["resources.gpus_per_node=0", "model.attention=varlen"],
            "varlen needs a GPU",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(overrides, expected):
    with pytest.raises(PlanError) as error:
        plan(*overrides)
    assert expected in str(error.value)


def test_several_problems_come_together():
    with pytest.raises(PlanError) as error:
        plan("data.max_tokens=4096", "resources.gpu=h1", "batch.micro_size=3")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("kind", ["hsdp", "zero2", "zero3"])
def test_a_shared_out_run_takes_less_of_each_gpu(kind):
    more = ["resources.nodes=2", "resources.backend=slurm"] if kind == "hsdp" else []
    result = plan(f"strategy.kind={kind}", "resources.gpus_per_node=4", *more)
    assert result.memory.peak_bytes < plan().memory.peak_bytes


def test_steps_follow_from_epochs_once_the_samples_are_counted():
    spec = spec_from_tree(GOOD | {"schedule": {"epochs": 1.5, "warmup_ratio": 0.1}})
    assert make_plan(spec).length.steps is None
    length = plan_length(spec, 100)
    assert (length.steps, length.warmup_steps) == (10, 1)


def test_nf4_with_double_quantisation_is_the_papers_4_127_bits_a_weight():
    packed, constants = nf4_bytes(4096 * 4096, double=True)
    assert (packed + constants) * 8 / 4096**2 == pytest.approx(4.127, abs=0.001)
    packed, constants = nf4_bytes(4096 * 4096, double=False)
    assert (packed + constants) * 8 / 4096**2 == pytest.approx(4.5, abs=0.001)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_counts_the_parameters_of_the_real_model(name):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_embeddings,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == shape.num_params


def test_guanaco_65b_fits_where_the_paper_ran_it():
    """48 GB, arXiv 2305.14314; the adapter in bf16 as the original has it."""
    spec = load_spec(CONFIGS / "guanaco-65b.yaml", ["adapter.dtype=bf16", "resources.gpu=48gib"])
    memory = make_plan(spec).memory
    assert memory.fits
    assert 35 * GIB < memory.peak_bytes < 40 * GIB


def test_planning_imports_no_torch_and_asks_no_network():
    code = f"""
import socket, sys
socket.socket = None
from qlora_launch.cli import main
assert main(["plan", {str(CONFIGS / "guanaco-65b.yaml")!r}]) == 0
assert main(["plan", "--json", {str(CONFIGS / "guanaco-65b.yaml")!r}]) == 0
assert main(["run", "--dry-run", {str(CONFIGS / "guanaco-65b.yaml")!r}]) == 0
heavy = {{"torch", "transformers", "datasets", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "65.29 B parameters" in done.stdout
