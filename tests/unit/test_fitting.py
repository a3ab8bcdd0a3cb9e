"""What a plan says where a run does not fit, and of what it takes beside GPU memory."""

import shutil
from pathlib import Path

import pytest

from qlora_dist.plan import make_plan
from qlora_dist.sizes import GIB
from qlora_dist.spec_file import load_spec
from qlora_launch.room import shortages
from qlora_launch.show import plan_text

GUANACO_65B = Path(__file__).parents[2] / "configs" / "guanaco-65b.yaml"
SLURM = ("resources.backend=slurm",)


def plan(*overrides):
    return make_plan(load_spec(GUANACO_65B, list(overrides)))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["resources.gpu=h100-80gb"], None),
        (["resources.gpus_per_node=2", "strategy.kind=fsdp"], None),
        (["resources.gpus_per_node=8", "strategy.kind=fsdp", "resources.gpu=a100-40gb"], None),
        (
            ["resources.gpus_per_node=2", "strategy.kind=fsdp", "resources.gpu=24gib"],
            [{"resources.gpus_per_node": 4}, {"resources.gpu": "a100-40gb"}],
        ),
        (
            ["resources.gpus_per_node=8", "strategy.kind=ddp", "resources.gpu=a100-40gb"],
            [
                {"adapter.dtype": "bf16", "optimizer.kind": "paged_adamw_8bit"},
                {"strategy.kind": "fsdp"},
                {"resources.gpu": "a6000-48gb"},
            ],
        ),
        (
            ["batch.micro_size=4", "model.gradient_checkpointing=false"],
            [{"model.gradient_checkpointing": True}],
        ),
        (
            [*SLURM, "resources.nodes=2", "strategy.kind=ddp", "resources.gpu=a100-40gb"],
            [
                {"adapter.dtype": "bf16", "optimizer.kind": "paged_adamw_8bit"},
                {"strategy.kind": "fsdp"},
            ],
        ),
        (
            [
                *(*SLURM, "resources.nodes=3", "strategy.kind=ddp", "resources.gpu=a100-40gb"),
                *("adapter.dtype=bf16", "batch.global_size=18"),
            ],
            [{"optimizer.kind": "paged_adamw_8bit"}, {"strategy.kind": "fsdp"}],
        ),
        (
            [
                *("resources.gpus_per_node=3", "strategy.kind=fsdp", "resources.gpu=16gib"),
                "batch.global_size=36",
            ],
            [{"resources.gpus_per_node": 6}],
        ),
    ],
)
def test_what_would_make_a_run_fit_is_named(overrides, expected):
    made = plan(*overrides)
    if expected is None:
        assert made.memory.fits
        assert made.would_fit == ()
        return
    assert not made.memory.fits
    found = [dict(fit.changes) for fit in made.would_fit]
    assert found[: len(expected)] == expected
    for fit in made.would_fit:
        changes = [f"{key}={str(value).lower()}" for key, value in fit.changes.items()]
        again = plan(*overrides, *changes)
        assert again.memory.fits
        assert again.memory.needed_bytes == fit.needed_bytes
    assert "would fit" in plan_text(made)


def test_paged_moments_that_have_no_room_are_said_to_move():
    made = plan("resources.gpu=40gib", "adapter.dtype=bf16")
    assert not made.memory.fits
    line = next(line for line in plan_text(made).splitlines() if line.startswith("  fits"))
    assert "by paging" in line


def test_bytes_between_gpus_are_counted():
    single, ddp, fsdp = (
        plan(),
        plan("strategy.kind=ddp", "resources.gpus_per_node=4"),
        plan("strategy.kind=fsdp", "resources.gpus_per_node=4"),
    )
    adapter = 799_539_200 * 4
    assert single.footprint.network == ()
    assert [line.bytes for line in ddp.footprint.network] == [2 * adapter * 3 // 4]
    base = next(line.bytes for line in fsdp.footprint.network if line.name == "base")
    # 32.1 GiB of base, 1 GiB of it gathered once and the rest twice, in each of 4 forward passes.
    assert base / GIB == pytest.approx(4 * (2 * 31.1 + 1) * 3 / 4, rel=0.01)


def test_a_disk_without_room_is_said_before_the_run(tmp_path, monkeypatch):
    made = plan(f"run_dir={tmp_path / 'run'}", f"quantization.cache_dir={tmp_path / 'cache'}")
    total = sum(line.bytes for line in made.footprint.disk if line.name != "one checkpoint")
    usage = shutil.disk_usage(tmp_path)

    def disk_usage(_):
        return usage._replace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    free = total
    assert shortages(made) == []
    free = total - 1
    (line,) = shortages(made)
    assert "checkpoint.keep_last" in line
    assert str(tmp_path) in line
