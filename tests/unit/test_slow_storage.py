"""The one fault that lasts."""

from types import SimpleNamespace

import pytest

from qlora_dist import faults


@pytest.fixture
def sleeps(monkeypatch):
    found = []
    monkeypatch.setattr(faults, "_armed", None)
    # Its own time alone: other threads sleep too.
    monkeypatch.setattr(faults, "time", SimpleNamespace(sleep=found.append))
    return found


def test_storage_that_becomes_slow_stays_slow(sleeps, tmp_path):
    faults.arm("save-write#2@1=slow:7", rank=1, attempt=0, disk=tmp_path)
    for moment in ("save-write", "save-begin", "save-write", "save-write"):
        faults.reach(moment)
    assert sleeps == [7, 7]


@pytest.mark.parametrize("text", ["save-write=slow", "save-write=slow:x", "save=slow:1", "=slow:1"])
def test_a_fault_that_is_none_is_refused(sleeps, tmp_path, text):
    with pytest.raises(ValueError, match=r"and a kind of sigterm, .*, slow:SECONDS"):
        faults.arm(text, rank=0, attempt=0, disk=tmp_path)
