"""A run goes on with other processes or another length, and not with another method."""

import json
import shutil

import pytest

from qlora_dist import checkpoints
from qlora_dist.layout import RunDir, open_run
from qlora_dist.train.compare import differences, records


def test_one_process_then_two_then_four_see_the_same_samples_and_lose_as_much(
    config, qlora, stop, tmp_path
):
    """fp32, no dropout: only the order of sums differs."""
    alone = {
        "adapter__dropout": 0.0,
        "strategy__kind": "single",
        "resources__processes_per_node": 1,
    }
    qlora("run", config("whole", **alone))
    qlora("run", config("grown", **alone), "--prepare")
    run = RunDir(tmp_path / "grown")
    code, output = stop("resume", run.root, count=3)
    assert code == 85, output
    first = max(step for kind, step in records(run) if kind == "train")
    two = ["strategy.kind=ddp", "resources.processes_per_node=2"]
    code, output = stop("resume", run.root, *two, count=len(records(run)) + 2)
    assert code == 85, output
    assert "2 processes go on where 1 stopped" in output
    done = qlora("resume", run.root, "resources.processes_per_node=4")
    assert "4 processes go on where 2 stopped" in done.stdout
    assert "resources.processes_per_node was 2 and is 4: not bit for bit the same" in done.stdout
    assert first < 10

    ours, theirs = records(run), records(RunDir(tmp_path / "whole"))
    assert set(ours) == set(theirs)
    for key, record in theirs.items():
        assert ours[key].get("samples") == record.get("samples")
        loss = float.fromhex(record["loss"])
        assert float.fromhex(ours[key]["loss"]) == pytest.approx(loss, rel=1e-5)
    assert open_run(run.root)[1].resources.processes_per_node == 4


def test_a_finished_run_can_be_made_longer(config, qlora, tmp_path):
    changes = {"schedule__kind": "constant", "schedule__warmup_steps": 0}
    qlora("run", config("short", **changes, schedule__steps=6))
    qlora("run", config("long", **changes, schedule__steps=9))
    done = qlora("resume", tmp_path / "short", "schedule.steps=9")
    assert "schedule.steps was 6 and is 9" in done.stdout
    short, long = RunDir(tmp_path / "short"), RunDir(tmp_path / "long")
    ours, theirs = records(short), records(long)
    steps = [key for key in theirs if key[0] == "train"]
    assert [ours[key] for key in steps] == [theirs[key] for key in steps]
    # The adapter is the longer run's too, even if it was lost sight of in between.
    training = short.adapter / "training.json"
    tree = json.loads(training.read_text())
    assert tree["step"] == tree["newest_step"] == 9
    training.write_text(json.dumps(tree | {"step": 6, "newest_step": 6}))
    assert "adapter written" in qlora("resume", short.root).stdout
    assert json.loads(training.read_text())["step"] == 9


def test_fewer_steps_than_are_done_are_refused(whole_run, copy_of, qlora):
    run = copy_of(whole_run)
    done = qlora("resume", run.root, "schedule.steps=4", code=2)
    assert "4 steps, and the run has 10 behind it" in done.stderr


def test_another_method_is_refused_key_by_key(whole_run, copy_of, qlora):
    run = copy_of(whole_run)
    before = run.run_json.read_bytes()
    done = qlora("resume", run.root, "optimizer.lr=1.0", "seed=8", "name=free", code=2)
    assert "optimizer.lr: was 0.001, is 1.0" in done.stderr
    assert "seed: was 7, is 8" in done.stderr
    assert "name: was" not in done.stderr
    qlora("resume", run.root, "strategy.kind=single", code=2)
    qlora("resume", run.root, "schedule.steps=1", code=2)
    assert run.run_json.read_bytes() == before


def test_a_trained_run_is_never_replaced_by_another_spec(whole_run, copy_of, qlora, config):
    run = copy_of(whole_run)
    shutil.rmtree(run.checkpoints)
    done = qlora("run", config(run_dir=str(run.root)), "optimizer.lr=1.0", code=2)
    assert "belongs to another spec" in done.stderr
    assert run.adapter.is_dir()


def test_a_run_json_that_was_edited_by_hand_is_noticed_at_the_checkpoint(
    half_run, qlora
):
    tree = json.loads(half_run.run_json.read_text())
    tree["spec"]["optimizer"]["beta1"] = 0.5
    half_run.run_json.write_text(json.dumps(tree))
    done = qlora("resume", half_run.root, code=2)
    assert "optimizer.beta1: was 0.9, is 0.5" in done.stderr


def test_saving_more_often_changes_nothing_else(whole_run, half_run, qlora):
    qlora("resume", half_run.root, "checkpoint.every_steps=1", "checkpoint.keep_last=20")
    assert differences(whole_run, half_run) == []
    assert len(checkpoints.committed_paths(half_run.checkpoints)) > 5


def test_packed_sequences_train_stop_and_resume_exactly(config, qlora, stop, tmp_path):
    changes = {
        "data__packing": True,
        "batch__global_size": 4,
        "batch__micro_size": 1,
        "optimizer__kind": "adamw_8bit",
    }
    qlora("run", config("whole", **changes))
    qlora("run", config("half", **changes), "--prepare")
    whole, half = RunDir(tmp_path / "whole"), RunDir(tmp_path / "half")
    code, output = stop("resume", half.root, count=4)
    assert code == 85, output
    done = qlora("resume", half.root)
    assert "packed into" in done.stdout
    assert differences(whole, half) == []


def test_a_deterministic_run_gives_the_same_bits_again(config, qlora, tmp_path):
    for name in ("one", "two"):
        qlora("run", config(name, deterministic=True, schedule__steps=4))
    assert differences(RunDir(tmp_path / "one"), RunDir(tmp_path / "two")) == []
