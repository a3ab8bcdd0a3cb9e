"""What is printed by --dry-run is what is written, and what the engines read."""

import json
import sys

import pytest
import yaml

from qlora_dist.engine_config import check_files
from qlora_dist.errors import PlanError, QLoRAError, RunDirError
from qlora_dist.layout import open_run
from qlora_dist.plan import make_plan
from qlora_dist.spec_file import spec_from_tree
from qlora_launch.render import render
from qlora_launch.rundir import write_run_dir
from qlora_launch.show import bundle_text
from tests.unit.test_spec import GOOD


def bundle(*overrides):
    plan = make_plan(spec_from_tree(GOOD, overrides))
    return render(plan), plan.spec


def test_the_torchrun_command_is_a_list_of_arguments(tmp_path):
    nasty = tmp_path / "a 'b' \"c\" $(d)\n;e"
    made, _ = bundle(
        f"run_dir={json.dumps(str(nasty))}", "strategy.kind=ddp", "resources.gpus_per_node=4"
    )
    assert made.argv == (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=4",
        "--max-restarts=0",
        "--monitor-interval=0.2",
        "-m",
        "qlora_dist.train.worker",
        str(nasty),
    )


def test_the_dry_run_shows_every_file_word_by_word():
    made, _ = bundle("strategy.kind=zero3", "resources.gpus_per_node=2")
    text = bundle_text(made)
    assert set(made.files) == {"run.json", "accelerate.yaml", "command.json", "ds_config.json"}
    for content in made.files.values():
        assert content.rstrip() in text


def test_the_accelerate_file_of_a_ddp_run():
    made, _ = bundle("strategy.kind=ddp", "resources.gpus_per_node=2")
    assert yaml.safe_load(made.files["accelerate.yaml"]) == {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "MULTI_GPU",
        "downcast_bf16": "no",
        "enable_cpu_affinity": False,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "bf16",
        "num_machines": 1,
        "num_processes": 2,
        "rdzv_backend": "static",
        "same_network": True,
        "tpu_use_cluster": False,
        "use_cpu": False,
    }


@pytest.mark.parametrize("kind", ["single", "ddp", "fsdp", "hsdp", "zero2", "zero3"])
def test_accelerate_reads_the_file_of_every_strategy(tmp_path, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    overrides = [f"strategy.kind={kind}", "resources.backend=slurm"]
    if kind != "single":
        overrides += ["resources.gpus_per_node=2", "resources.nodes=2"]
    made, _ = bundle(*overrides)
    path = tmp_path / "accelerate.yaml"
    path.write_text(made.files["accelerate.yaml"])
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == (1 if kind == "single" else 4)
    if kind in ("zero2", "zero3"):
        assert json.loads(made.files["ds_config.json"])["zero_optimization"]["stage"] == int(
            kind[-1]
        )


def test_files_are_compared_with_the_plan(tmp_path):
    made, spec = bundle(
        f"run_dir={tmp_path / 'r'}", "strategy.kind=zero2", "resources.gpus_per_node=2"
    )
    run = write_run_dir(made, spec)
    check_files(run.root, make_plan(spec))
    text = run.ds_config.read_text()
    run.ds_config.write_text(text.replace('"stage": 2', '"stage": 3'))
    with pytest.raises(PlanError, match=r"zero_optimization\.stage is 3, run.json wants 2"):
        check_files(run.root, make_plan(spec))


def test_a_run_directory_is_private_and_reads_back(tmp_path):
    made, spec = bundle(f"run_dir={tmp_path / 'r'}")
    run = write_run_dir(made, spec)
    assert run.root.stat().st_mode & 0o777 == 0o700
    assert open_run(run.root)[1] == spec
    assert write_run_dir(made, spec).root == run.root


def test_another_spec_is_refused_key_by_key(tmp_path):
    made, spec = bundle(f"run_dir={tmp_path / 'r'}")
    write_run_dir(made, spec).checkpoints.joinpath("step_000001").mkdir(parents=True)
    other, other_spec = bundle(f"run_dir={tmp_path / 'r'}", "optimizer.lr=1e-3", "seed=4")
    with pytest.raises(RunDirError) as error:
        write_run_dir(other, other_spec)
    assert "optimizer.lr: was 0.0002, is 0.001" in str(error.value)
    assert "seed: was 0, is 4" in str(error.value)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.tex").write_text("x")
    made, spec = bundle(f"run_dir={tmp_path / 'r'}")
    with pytest.raises(RunDirError, match="holds no run"):
        write_run_dir(made, spec)
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    made, spec = bundle(f"run_dir={tmp_path / 'file' / 'r'}")
    with pytest.raises(QLoRAError, match="cannot create"):
        write_run_dir(made, spec)
