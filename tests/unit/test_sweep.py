"""One config and lists of values: which runs they are."""

import json
from pathlib import Path

import pytest

from qlora_dist.errors import SpecError
from qlora_launch.sweep import sweep_specs
from tests.unit.test_spec import GOOD


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps({**GOOD, "run_dir": str(tmp_path / "runs")}))
    return path


def test_every_combination_is_a_run_of_its_own(config, tmp_path):
    specs = sweep_specs(config, ["seed=3"], ["optimizer.lr=1e-4,2e-4", "adapter.r=8,16"])
    assert [(s.optimizer.lr, s.adapter.r, s.seed) for s in specs] == [
        (1e-4, 8, 3),
        (1e-4, 16, 3),
        (2e-4, 8, 3),
        (2e-4, 16, 3),
    ]
    folders = [Path(s.run_dir) for s in specs]
    assert folders[0] == tmp_path / "runs" / "lr-1e-4_r-8"
    assert len({*folders}) == len({s.name for s in specs}) == 4


def test_a_value_may_be_a_list_or_nasty(config):
    specs = sweep_specs(config, [], ["adapter.target=[q_proj,v_proj],all-linear"])
    assert [s.adapter.target for s in specs] == [["q_proj", "v_proj"], "all-linear"]
    (spec,) = sweep_specs(config, [], ["model.source=/a $(b)"])
    assert Path(spec.run_dir).name == "source--a-b"


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("optimizer.lr", "an override is section.key=value"),
        ("optimizer.lr=1e-4,1e-4", "would be two runs"),
        ("resources.nodes=1,2", "one array of equal jobs"),
        ("optimizer.lr=1e-4,fast", "optimizer.lr"),
    ],
)
def test_what_is_no_sweep_is_refused(config, axis, message):
    with pytest.raises(SpecError, match=message):
        sweep_specs(config, [], [axis])
