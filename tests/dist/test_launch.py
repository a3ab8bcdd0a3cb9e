"""The ways to start a run give the same run, and its adapter is what was trained."""

import json
import os
import subprocess
import sys

import pytest
import torch

from qlora_dist.data.build import open_corpus
from qlora_dist.layout import RunDir, open_run
from qlora_dist.train.compare import differences, records


def accelerate_launch(run):
    return subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", run.accelerate_yaml),
            *("-m", "qlora_dist.train.worker", run.root),
        ],
        cwd=run.root.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_accelerate_launch_with_the_runs_own_file_gives_the_same_bits(config, qlora, whole_run):
    path = config("by-accelerate")
    qlora("run", path, "--prepare")
    run = RunDir(path.with_suffix(""))
    done = accelerate_launch(run)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stderr
    assert differences(whole_run, run) == []


def test_an_accelerate_file_that_disagrees_with_run_json_is_refused(config, qlora):
    path = config("edited")
    qlora("run", path, "--prepare")
    run = RunDir(path.with_suffix(""))
    text = run.accelerate_yaml.read_text()
    run.accelerate_yaml.write_text(text.replace("mixed_precision: 'no'", "mixed_precision: bf16"))
    done = qlora("resume", run.root, code=2)
    assert "accelerate.yaml: mixed_precision is 'bf16', run.json wants 'no'" in done.stderr


def test_one_process_sees_the_samples_of_two_and_loses_as_much(config, qlora):
    """fp32, no dropout: only the order of sums differs."""
    changes = {"adapter__dropout": 0.0, "schedule__steps": 5}
    one = config(
        "one", **changes, strategy__kind="single", resources__processes_per_node=1
    )
    two = config("two", **changes)
    for path in (one, two):
        qlora("run", path)
    ours, theirs = (records(RunDir(path.with_suffix(""))) for path in (one, two))
    assert set(ours) == set(theirs)
    for key, record in ours.items():
        assert record.get("samples") == theirs[key].get("samples")
        loss = float.fromhex(record["loss"])
        assert float.fromhex(theirs[key]["loss"]) == pytest.approx(loss, rel=1e-6)


def test_the_adapter_loads_with_peft_and_is_the_trained_model(whole_run):
    """The held-out loss of base + adapter, from a fresh load, is the one that training printed."""
    from peft import PeftModel

    from qlora_dist.train.batch import make_batch
    from qlora_dist.train.evaluate import evaluation_mode
    from qlora_dist.train.load import load_base
    from qlora_dist.train.objective import summed_loss

    run, spec = open_run(whole_run.root)
    base = load_base(spec, device=torch.device("cpu"), attention="sdpa")
    model = PeftModel.from_pretrained(base, run.adapter)
    samples = open_corpus(run, spec).validation
    with evaluation_mode(model), torch.no_grad():
        total = sum(
            float(summed_loss(model, make_batch([[s]], flat=False, pad_id=0, device=base.device)))
            for s in samples
        )
    loss = total / sum(s.num_targets for s in samples)
    last = float.fromhex(records(run)["eval", 10]["loss"])
    assert loss == pytest.approx(last, rel=2e-5)
    before = float.fromhex(records(run)["eval", 0]["loss"])
    assert abs(before - last) > 100 * abs(loss - last)


def test_generate_answers_from_a_run_an_adapter_and_a_merged_folder(whole_run, copy_of, qlora):
    run = copy_of(whole_run)
    qlora("export", run.root, "--base", "16bit", "--no-check")
    for model in (run.root, run.adapter, run.merged):
        done = qlora("generate", model, "Question 1: what ?", "--max-new-tokens", "4")
        assert done.stdout.strip()
    done = qlora("generate", run.root, "word " * 300, code=2)
    assert "does not fit into the model's 256" in done.stderr


def test_a_finished_run_resumes_to_nothing(whole_run, copy_of, qlora):
    run = copy_of(whole_run)
    done = qlora("resume", run.root)
    assert "done" in done.stdout
    assert differences(whole_run, run) == []


def test_paged_adamw_and_bf16_train_and_resume_exactly(config, qlora, stop, whole_run):
    changes = {
        "model__dtype": "bf16",
        "model__gradient_checkpointing": True,
        "optimizer__kind": "paged_adamw_32bit",
        "tracking__kind": "tensorboard",
    }
    whole, half = config("whole-bf16", **changes), config("half-bf16", **changes)
    qlora("run", whole)
    qlora("run", half, "--prepare")
    run = RunDir(half.with_suffix(""))
    code, output = stop("resume", run.root, count=4)
    assert code == 85, output
    qlora("resume", run.root)
    assert differences(RunDir(whole.with_suffix("")), run) == []
    assert differences(whole_run, run) != []
    assert len(list(run.tracking.rglob("events.out.*"))) == 2


def test_consolidate_writes_the_best_or_a_numbered_checkpoint(whole_run, copy_of, qlora):
    run = copy_of(whole_run)
    for which, step in (("best", 10), ("9", 9), ("last", 10)):
        qlora("consolidate", run.root, "--checkpoint", which)
        assert json.loads((run.adapter / "training.json").read_text())["step"] == step
    done = qlora("consolidate", run.root, "--checkpoint", "4", code=2)
    assert "there are last and 9, 10" in done.stderr
