"""DeepSpeed's strategies: the run that ddp makes, resumed bit for bit, and under any other."""

import json

import pytest

from qlora_dist.layout import RunDir
from qlora_dist.train.compare import differences
from tests.dist.test_full import FULL, single, tied_model, unlike  # noqa: F401 - fixtures

BF16 = {"model__dtype": "bf16", "optimizer__kind": "paged_adamw_32bit"}


@pytest.fixture
def run_of(config, qlora):
    """Run a config from end to end."""

    def go(name, **changes):
        path = config(name, **changes)
        qlora("run", path)
        return RunDir(path.with_suffix(""))

    return go


@pytest.fixture
def stopped_and_resumed(config, qlora, stop):
    """Run a config with a stop in the middle."""

    def go(name, **changes):
        path = config(name, **changes)
        qlora("run", path, "--prepare")
        run = path.with_suffix("")
        code, output = stop("resume", run, count=5)
        assert code == 85, output
        qlora("resume", run)
        return RunDir(run)

    return go


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_run_is_ddps_and_a_resumed_one_the_unbroken_one(
    run_of, stopped_and_resumed, whole_run, kind
):
    """NF4, with dropout; the norm is summed in another order."""
    whole = run_of("whole-zero", strategy__kind=kind)
    assert unlike(whole, whole_run, loss=1e-6) == []
    assert differences(whole, stopped_and_resumed("half", strategy__kind=kind)) == []


def test_a_run_goes_from_ddp_to_fsdp_to_zero3(half_run, whole_run, stop, qlora):
    """The samples of every step are those of the unbroken run, and so are the losses."""
    code, output = stop("resume", half_run.root, "strategy.kind=fsdp", count=6)
    assert code == 85, output
    qlora("resume", half_run.root, "strategy.kind=zero3")
    assert unlike(half_run, whole_run, loss=1e-6) == []


def test_an_engine_file_that_was_edited_by_hand_is_refused(config, qlora):
    path = config("edited", strategy__kind="zero2")
    qlora("run", path, "--prepare")
    run = RunDir(path.with_suffix(""))
    file = run.root / "ds_config.json"
    tree = json.loads(file.read_text())
    tree["zero_optimization"]["reduce_bucket_size"] = 1000
    file.write_text(json.dumps(tree))
    done = qlora("resume", run.root, code=2)
    assert (
        "ds_config.json: zero_optimization.reduce_bucket_size is 1000, run.json wants 16777216"
    ) in done.stderr


@pytest.mark.matrix
@pytest.mark.parametrize(
    "changes",
    [
        {**BF16, "model__gradient_checkpointing": True},
        {"quantization__kind": "none", "model__gradient_checkpointing": True},
    ],
    ids=["bf16", "lora"],
)
def test_other_methods_are_ddps_too(run_of, changes):
    # Sums of gradients have another order, which bf16 rounds away or not.
    bound = 1e-4 if changes.get("model__dtype") == "bf16" else 1e-6
    zero = run_of("zero", strategy__kind="zero3", **changes)
    ddp = run_of("ddp", strategy__kind="ddp", **changes)
    assert unlike(zero, ddp, loss=bound) == []


@pytest.mark.matrix
def test_full_fine_tuning_is_resumed_exactly(run_of, stopped_and_resumed, tied_model):  # noqa: F811
    changes = {**FULL, "model__source": str(tied_model), "strategy__kind": "zero3"}
    whole = run_of("whole-full", **changes)
    assert differences(whole, stopped_and_resumed("half-full", **changes)) == []


@pytest.mark.matrix
def test_full_fine_tuning_under_zero2(run_of, single, tied_model):  # noqa: F811
    run = run_of("full", **{**FULL, "model__source": str(tied_model), "strategy__kind": "zero2"})
    assert unlike(run, single, loss=1e-6) == []
