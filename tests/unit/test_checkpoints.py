"""The commit protocol: only whole checkpoints are ever read, and the last one is never lost."""

import os

import pytest

from qlora_dist import checkpoints
from qlora_dist.errors import CheckpointError


def make(folder, step, text="weights"):
    partial = checkpoints.begin(folder, step)
    (partial / "weights" / "00000.safetensors").write_text(text)
    (partial / "rng" / "00000.safetensors").write_text("rng")
    return checkpoints.commit(
        partial, step=step, facts={"world_size": 1}, files=checkpoints.describe(partial)
    )


def test_a_committed_checkpoint_opens_and_knows_its_files(tmp_path):
    found = checkpoints.open_checkpoint(make(tmp_path / "c", 100))
    assert found.step == 100
    assert found.path.name == "step_000100"
    assert set(found.manifest["files"]) == {"weights/00000.safetensors", "rng/00000.safetensors"}


def test_there_is_nothing_to_resume_from_before_the_first_commit(tmp_path):
    checkpoints.begin(tmp_path / "c", 1)
    assert checkpoints.newest_valid(tmp_path / "c") == (None, [])


def flip(path):
    data = bytearray((path / "weights" / "00000.safetensors").read_bytes())
    data[0] ^= 1
    (path / "weights" / "00000.safetensors").write_bytes(data)


def truncate(path):
    os.truncate(path / "weights" / "00000.safetensors", 3)


def remove(path):
    (path / "weights" / "00000.safetensors").unlink()


def add(path):
    (path / "stranger").write_text("x")


def no_manifest(path):
    (path / "manifest.json").unlink()


def bad_manifest(path):
    (path / "manifest.json").write_text("{")


def other_step(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 200', '"step": 300'))


def link(path):
    (path / "weights" / "00000.safetensors").unlink()
    (path / "weights" / "00000.safetensors").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    "damage", [flip, truncate, remove, add, no_manifest, bad_manifest, other_step, link]
)
def test_a_damaged_one_is_set_aside_and_the_one_before_it_taken(tmp_path, damage):
    folder = tmp_path / "c"
    make(folder, 100)
    damage(make(folder, 200))
    found, said = checkpoints.newest_valid(folder)
    assert found.step == 100
    assert len(said) == 1
    assert "set aside as step_000200.invalid" in said[0]
    assert (folder / "step_000200.invalid").is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_one_that_belongs_to_somebody_else_is_not_read(tmp_path):
    folder = tmp_path / "c"
    path = make(folder, 100)
    os.chown(path / "weights" / "00000.safetensors", 12345, 12345)
    with pytest.raises(CheckpointError, match="belongs to another user"):
        checkpoints.open_checkpoint(path)


def test_when_none_is_valid_nothing_is_touched(tmp_path):
    folder = tmp_path / "c"
    flip(make(folder, 100))
    with pytest.raises(CheckpointError, match="no checkpoint is valid"):
        checkpoints.newest_valid(folder)
    assert (folder / "step_000100").is_dir()


def test_old_ones_go_but_for_the_best_and_those_kept_for_good(tmp_path):
    folder = tmp_path / "c"
    for step in (10, 15, 20, 30, 40):
        make(folder, step)
    checkpoints.retain(folder, keep_last=2, keep_every=20, best_steps={10, None})
    assert sorted(p.name for p in folder.iterdir()) == [
        *("step_000010", "step_000020", "step_000030", "step_000040"),
    ]


def test_a_running_save_never_costs_the_last_valid_one(tmp_path):
    folder = tmp_path / "c"
    make(folder, 10)
    checkpoints.begin(folder, 20)
    checkpoints.retain(folder, keep_last=1, keep_every=None, best_steps=set())
    found, _ = checkpoints.newest_valid(folder)
    assert found.step == 10
    assert [p.name for p in folder.iterdir()] == ["step_000010"]


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    folder = tmp_path / "c"
    make(folder, 10, "old")
    path = make(folder, 10, "new")
    assert (path / "weights" / "00000.safetensors").read_text() == "new"
    assert [p.name for p in folder.iterdir()] == ["step_000010"]
    checkpoints.open_checkpoint(path)


def test_steps_past_six_digits_are_ordered_by_number(tmp_path):
    folder = tmp_path / "c"
    for step in (999_999, 1_000_000):
        make(folder, step)
    found, _ = checkpoints.newest_valid(folder)
    assert found.step == 1_000_000
