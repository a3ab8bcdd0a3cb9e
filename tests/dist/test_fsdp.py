"""Sharded runs: the same bytes as on one device, and the same run as under ddp, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qlora_dist.layout import RunDir
from qlora_dist.train.compare import differences

BENCH = Path(__file__).parent.parent.parent / "bench"


def torchrun(script, processes, *arguments):
    """The JSON of a script's last line, on gloo processes."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={processes}", str(script), *arguments),
        ],
        env=os.environ
        | {"PYTHONPATH": f"{BENCH.parent}{os.pathsep}{BENCH}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (2, ["--recompute"]),
        (3, []),
        (2, ["--single", "--dtype", "fp32"]),
        (4, ["--kind", "hsdp"]),
        (3, ["--kind", "zero3", "--recompute"]),
        pytest.param(2, ["--kind", "zero2"], marks=pytest.mark.matrix),
    ],
)
def test_what_a_rank_computes_with_is_what_one_device_would_have_made(processes, arguments):
    counted = torchrun(BENCH / "shard_bytes.py", processes, *arguments)
    assert counted["matrices"] >= processes * 150
    assert counted["compared"] > 10_000_000
    assert counted["different"] == 0
    if "received" in counted:
        # The plan leaves out rows that only fill up.
        assert counted["planned"] == pytest.approx(counted["received"], rel=0.02)


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("zero3", marks=pytest.mark.matrix)])
def test_the_comparison_sees_one_bit(kind):
    counted = torchrun(BENCH / "shard_bytes.py", 2, "--damage", "--kind", kind)
    assert counted["different"] == counted["matrices"] > 0


# Tokens, vocabulary, recomputation, what is trained: when the plan says that a step takes most.
STEPS = {
    "64,8192,yes,adapter": "the first layer's gather",
    "64,8192,yes,rows": "the first layer's gather",
    "1024,8192,yes,adapter": "the loss's gradient",
    "1024,8192,yes,all": "the loss's gradient",
    "1024,512,yes,adapter": "the last layer's backward pass",
    "1024,512,yes,rows": "the last layer's backward pass",
    "1024,512,yes,all": "the last layer's backward pass",
    "1024,512,no,adapter": "the last layer's backward pass",
    "1024,512,no,rows": "the last layer's backward pass",
}


@pytest.fixture(scope="module")
def sharded_steps():
    """What each of these steps took, all counted by the same two processes."""
    return torchrun(BENCH.parent / "tests" / "sharded_step.py", 2, *STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_the_predicted_peak_is_that_of_a_sharded_step(sharded_steps, step):
    counted = sharded_steps[step]
    print(counted)
    assert counted["moment"] == STEPS[step]
    assert counted["said"]["before"] == pytest.approx(counted["before"], rel=0.01)
    assert counted["said"]["peak"] == pytest.approx(counted["peak"], rel=0.02)


@pytest.mark.parametrize("kind", ["nf4", pytest.param("none", marks=pytest.mark.matrix)])
def test_a_sharded_run_is_the_replicated_one(config, qlora, kind):
    changes = {"quantization__kind": kind, "model__gradient_checkpointing": True}
    paths = [config(name, strategy__kind=name, **changes) for name in ("ddp", "fsdp")]
    for path in paths:
        qlora("run", path)
    runs = [RunDir(path.with_suffix("")) for path in paths]
    assert differences(*runs) == []
    sizes = [path.stat().st_size for path in sorted(runs[1].checkpoints.rglob("optimizer/*"))]
    # Each rank has about a half of the moments, of two checkpoints.
    assert len(sizes) == 4
    assert max(sizes) < 1.3 * min(sizes)


def test_a_run_goes_from_ddp_to_fsdp_and_back(half_run, whole_run, stop, qlora):
    """Three attempts, each with another strategy: still the unbroken run."""
    code, output = stop("resume", half_run.root, "strategy.kind=fsdp", count=5)
    assert code == 85, output
    assert len(list((half_run.checkpoints).glob("*/optimizer/00001.safetensors"))) >= 1
    qlora("resume", half_run.root, "strategy.kind=ddp")
    assert differences(whole_run, half_run) == []


@pytest.mark.matrix
def test_three_processes_go_on_where_two_stopped(config, qlora, stop):
    """The samples of every step are those of the plan, and every moment finds its parameter."""
    changes = {"strategy__kind": "fsdp", "batch__global_size": 12, "adapter__dropout": 0}
    whole, half = config("whole", **changes), config("half", **changes)
    qlora("run", whole)
    qlora("run", half, "--prepare")
    run = half.with_suffix("")
    code, output = stop("resume", run, count=4)
    assert code == 85, output
    done = qlora("resume", run, "resources.processes_per_node=3")
    assert "3 processes go on where 2 stopped" in done.stdout
    ours, theirs = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run, whole.with_suffix(""))
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.get("samples") == other.get("samples")
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.matrix
def test_a_tied_head_is_sharded_once(config, qlora, tiny_model, tmp_path):
    """SmolLM2 and other small models keep one matrix for embedding and head."""
    tied = shutil.copytree(tiny_model, tmp_path / "tied")
    settings = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    tensors = load_file(tied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    paths = [config(n, strategy__kind=n, model__source=str(tied)) for n in ("ddp", "fsdp")]
    for path in paths:
        qlora("run", path)
    assert differences(*(RunDir(path.with_suffix("")) for path in paths)) == []
