"""A run that was stopped and resumed is the run that never was, and the check of it bites."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist import checkpoints
from qlora_dist.train.compare import differences, records


def test_a_run_stopped_twice_is_the_unbroken_run(whole_run, half_run, qlora, stop):
    code, output = stop(
        "resume", half_run.root, count=len(records(half_run)) + 3, number=signal.SIGINT
    )
    assert code == 85, output
    done = qlora("resume", half_run.root)
    assert "resumed after step" in done.stdout
    assert len(list(half_run.attempts.iterdir())) == 3
    assert differences(whole_run, half_run) == []


def drop_moments(path):
    moments = load_file(path / "optimizer.safetensors")
    save_file({k: torch.zeros_like(v) for k, v in moments.items()}, path / "optimizer.safetensors")


def drop_generators(path):
    for file in (path / "rng").iterdir():
        state = load_file(file)
        state["torch"] = torch.Generator().manual_seed(1).get_state()
        save_file(state, file)


def drop_position(path):
    state = json.loads((path / "state.json").read_text())
    state["train"]["position"] = 0
    (path / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("drop", [drop_moments, drop_generators, drop_position])
def test_the_resume_check_sees_a_part_that_was_lost(whole_run, half_run, qlora, drop):
    path = checkpoints.committed_paths(half_run.checkpoints)[0]
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").unlink()
    drop(path)
    checkpoints.commit(
        path.rename(path.with_name(path.name + ".partial")),
        step=manifest["step"],
        facts={name: manifest[name] for name in ("spec_sha256", "world_size", "versions")},
    )
    qlora("resume", half_run.root)
    assert differences(whole_run, half_run) != []


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    whole_run, copy_of, qlora
):
    run = copy_of(whole_run)
    newest, before = checkpoints.committed_paths(run.checkpoints)[:2]
    data = bytearray((newest / "adapter.safetensors").read_bytes())
    data[-5] ^= 1
    (newest / "adapter.safetensors").write_bytes(data)
    done = qlora("resume", run.root)
    assert "its bytes changed after it was written; set aside" in done.stdout
    assert f"resumed after step {int(before.name[5:])} from" in done.stdout
    assert newest.with_name(newest.name + ".invalid").is_dir()
    assert differences(whole_run, run) == []


def test_no_valid_checkpoint_stops_the_run_and_deletes_nothing(half_run, qlora):
    for checkpoint in checkpoints.committed_paths(half_run.checkpoints):
        (checkpoint / "manifest.json").unlink()
    there = sorted(half_run.checkpoints.rglob("*"))
    done = qlora("resume", half_run.root, code=1)
    assert "no checkpoint is valid" in done.stderr
    assert sorted(half_run.checkpoints.rglob("*")) == there


def test_a_second_launcher_is_refused_and_a_killed_one_is_succeeded(
    whole_run, half_run, qlora, start
):
    first = start("resume", half_run.root, count=len(records(half_run)) + 1)
    refused = qlora("resume", half_run.root, code=2)
    assert f"is already being run by process {first.pid}" in refused.stderr
    first.kill()
    first.wait()
    assert half_run.owner_json.exists()
    qlora("resume", half_run.root)
    assert differences(whole_run, half_run) == []
    assert not half_run.owner_json.exists()
