"""A run that was stopped and resumed is the run that never was, and the check of it bites."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist import checkpoints
from qlora_dist.process import start_ticks
from qlora_dist.train.compare import differences, records


def test_a_run_stopped_twice_is_the_unbroken_run(whole_run, half_run, qlora, stop):
    code, output = stop(
        "resume", half_run.root, count=len(records(half_run)) + 1, number=signal.SIGINT
    )
    assert code == 85, output
    done = qlora("resume", half_run.root)
    assert "resumed after step" in done.stdout
    assert len(list(half_run.attempts.iterdir())) == 3
    assert differences(whole_run, half_run) == []


def drop_moments(path):
    file = path / "optimizer" / "00000.safetensors"
    save_file({k: torch.zeros_like(v) for k, v in load_file(file).items()}, file)


def drop_generators(path):
    for file in (path / "rng").iterdir():
        state = load_file(file)
        state["torch"] = torch.Generator().manual_seed(1).get_state()
        save_file(state, file)


def drop_position(path):
    state = json.loads((path / "state.json").read_text())
    state["train"]["position"] = 0
    (path / "state.json").write_text(json.dumps(state))


def drop_nothing(path):
    pass


@pytest.mark.parametrize(
    ("drop", "equal"),
    [(drop_nothing, True), (drop_moments, False), (drop_generators, False), (drop_position, False)],
)
def test_the_resume_check_sees_a_part_that_was_lost(whole_run, half_run, qlora, drop, equal):
    path = checkpoints.committed_paths(half_run.checkpoints)[0]
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").unlink()
    drop(path)
    partial = path.rename(path.with_name(path.name + ".partial"))
    checkpoints.commit(
        partial,
        step=manifest["step"],
        files=checkpoints.describe(partial),
        facts={
            name: manifest[name]
            for name in ("spec_sha256", "corpus_sha256", "world_size", "device", "versions")
        },
    )
    qlora("resume", half_run.root)
    assert (differences(whole_run, half_run) == []) == equal


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    whole_run, copy_of, qlora
):
    run = copy_of(whole_run)
    newest, before = checkpoints.committed_paths(run.checkpoints)[:2]
    data = bytearray((newest / "weights" / "00000.safetensors").read_bytes())
    data[-5] ^= 1
    (newest / "weights" / "00000.safetensors").write_bytes(data)
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


def test_a_signal_to_one_rank_or_to_the_launcher_stops_all_and_loses_nothing(
    whole_run, half_run, qlora, start
):
    launcher = start("resume", half_run.root, count=len(records(half_run)) + 1)
    rank = json.loads(half_run.rank_file(1, 1).read_text())["process"]["pid"]
    os.kill(rank, signal.SIGHUP)
    assert launcher.wait(60) == 85
    launcher = start("resume", half_run.root, count=len(records(half_run)) + 1)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(60) == 85
    qlora("resume", half_run.root)
    assert differences(whole_run, half_run) == []


def test_three_signals_end_a_hung_run_and_every_process_of_it(half_run, start):
    launcher = start("resume", half_run.root, count=len(records(half_run)) + 1)
    ranks = [
        json.loads(half_run.rank_file(1, rank).read_text())["process"]["pid"] for rank in (0, 1)
    ]
    os.kill(ranks[1], signal.SIGSTOP)
    for _ in range(3):
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.6)
    assert launcher.wait(60) == 1
    assert all(start_ticks(pid) is None for pid in ranks)
    assert not half_run.owner_json.exists()


def test_a_stop_survives_a_terminal_that_is_gone(whole_run, half_run, qlora, start):
    launcher = start("resume", half_run.root, count=len(records(half_run)) + 1)
    launcher.stdout.close()
    launcher.send_signal(signal.SIGHUP)
    assert launcher.wait(60) == 85
    qlora("resume", half_run.root)
    assert differences(whole_run, half_run) == []


def test_a_stop_during_the_last_evaluation_is_made_good_at_the_resume(
    whole_run, copy_of, qlora
):
    """The last step is committed and its evaluation is not: as such a stop leaves a run."""
    run = copy_of(whole_run)
    path = checkpoints.committed_paths(run.checkpoints)[0]
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").unlink()
    state = json.loads((path / "state.json").read_text())
    state["train"] |= {"evaluated_step": 8, "best_step": 8, "best_loss": 99.0}
    (path / "state.json").write_text(json.dumps(state))
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    state["train"]["metrics_bytes"] = len(b"".join(lines[:-1]))
    (path / "state.json").write_text(json.dumps(state))
    del manifest["files"]
    partial = path.rename(path.with_name(path.name + ".partial"))
    files = checkpoints.describe(partial)
    checkpoints.commit(partial, step=manifest.pop("step"), facts=manifest, files=files)
    qlora("resume", run.root)
    assert differences(whole_run, run) == []


def test_another_corpus_is_refused(config, qlora, stop, tmp_path, pairs_file):
    data = tmp_path / "data.jsonl"
    data.write_text(pairs_file.read_text())
    path = config("run", data__source=str(data))
    qlora("run", path, "--prepare")
    code, output = stop("resume", tmp_path / "run", count=3)
    assert code == 85, output
    with data.open("a") as file:
        file.write(json.dumps({"input": "one", "output": "more"}) + "\n")
    done = qlora("resume", tmp_path / "run", code=1)
    assert "the data is not the one that the run began with" in done.stderr


def test_nothing_is_committed_once_a_newer_attempt_has_begun(half_run, start):
    """As on a node that Slurm has given up, and that still reaches the storage."""
    process = start("resume", half_run.root, count=len(records(half_run)) + 1)
    half_run.attempt(2).mkdir()
    before = checkpoints.newest_step(half_run.checkpoints)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    assert "attempt 2 has begun: this one is over" in output
    assert checkpoints.newest_step(half_run.checkpoints) == before
