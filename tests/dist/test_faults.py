"""A run survives what happens to it; `make faults` is the whole matrix, and this a part of it."""

import os

import pytest
from faults import COUNTS, Faults, Row

# Every kind, and the stages in which most could be lost or left half done.
ROWS = [
    Row("tokenising", "sigterm"),
    Row("save-write", "exception", COUNTS["save-write"], rank=1),
    Row("save-manifest", "full-disk", COUNTS["save-manifest"]),
    Row("save-rename", "sigkill", COUNTS["save-rename"]),
]


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_run_that_meets_a_fault_goes_on_as_the_unbroken_run(faults, row):
    if row.kind == "full-disk" and os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    passed, line = faults.meet(row)
    assert passed, line
