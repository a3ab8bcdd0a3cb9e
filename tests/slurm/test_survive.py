"""Whatever happens to a job, its run comes back; `make slurm-faults` has every setting."""

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


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_meets_a_fault_comes_back_as_the_unbroken_run(faults, name):
    passed, line = faults.meet(name)
    print(line)
    assert passed, line
