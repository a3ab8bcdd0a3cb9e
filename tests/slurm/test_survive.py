"""Whatever happens to a job, its run comes back; `make slurm-faults` has every fault."""

import pytest
from slurm_faults import SlurmFaults
from slurm_strikes import FAULTS

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def faults(testbed, tmp_path_factory):
    # What it sets for its own process is set back.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", testbed.env["SLURM_CONF"])
        yield SlurmFaults(testbed, tmp_path_factory.mktemp("faults"))


# Those that other tests meet, or a run without Slurm; these differ little from others here.
ELSEWHERE = {"rank hangs", "exception", "rank killed", "scontrol requeue"}
ALIKE = {"preempted, --no-requeue", "scancel --signal=USR1 --batch"}


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in ELSEWHERE | ALIKE])
def test_a_run_that_meets_a_fault_comes_back_as_the_unbroken_run(faults, name):
    passed, line = faults.meet(name)
    print(line)
    assert passed, line
