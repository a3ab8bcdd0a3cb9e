"""Full fine-tuning, and adapters cut into rows: FSDP2 holds what is trained."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_dist import checkpoints
from qlora_dist.data.build import open_corpus
from qlora_dist.layout import RunDir, open_run
from qlora_dist.train.checkpoint import WEIGHTS, SavedRows
from qlora_dist.train.compare import differences, fingerprint, records
from tests.conftest import run_qlora, write_config

FULL = {
    "adapter": {"kind": "none"},
    "quantization": {"kind": "none"},
    "batch": {"global_size": 12, "micro_size": 1},
    "optimizer": {"kind": "adamw", "lr": 1e-3, "weight_decay": 0.1},
}


@pytest.fixture(scope="module")
def tied_model(tiny_model, tmp_path_factory):
    """The tiny model with one matrix for embedding and head, as small models have it."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("tied") / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run_full(folder, model, data, name, kind, processes, changes):
    """Run full fine-tuning under a strategy."""
    changes = {
        **FULL,
        "strategy__kind": kind,
        "resources__processes_per_node": processes,
        **changes,
    }
    path = write_config(folder, model, data, name, changes)
    run_qlora(folder, "run", path)
    return RunDir(path.with_suffix(""))


@pytest.fixture
def full_run(tmp_path, tied_model, pairs_file):
    """Run full fine-tuning of a tied model under a strategy; keys change the config."""

    def run(name, kind, processes, **changes):
        return run_full(tmp_path, tied_model, pairs_file, name, kind, processes, changes)

    return run


@pytest.fixture(scope="module")
def single(tmp_path_factory, tied_model, pairs_file):
    """Such a run on one process. Not to be changed."""
    folder = tmp_path_factory.mktemp("single")
    return run_full(folder, tied_model, pairs_file, "single", "single", 1, {})


def weights_of(run):
    """What the last checkpoint of a run holds."""
    path = checkpoints.committed_paths(run.checkpoints)[0]
    with SavedRows(checkpoints.read_manifest(path), WEIGHTS) as saved:
        return {name: saved.read_whole(name) for name in saved.names}


def unlike(ours, theirs, *, loss):
    """Where two runs differ: samples at all, losses, norms and final weights beyond bounds."""
    left, right = records(ours), records(theirs)
    if left.keys() != right.keys():
        return sorted(left.keys() ^ right.keys())
    bounds = {"loss": loss, "grad_norm": 20 * loss}
    found = []
    for key, record in left.items():
        for name, value in record.items():
            there = right[key][name]
            if name in bounds:
                here, there = float.fromhex(value), float.fromhex(there)
                same = here == pytest.approx(there, rel=bounds[name])
            else:
                same = value == there
            if not same:
                found.append((*key, name, value, there))
    weights, finals = weights_of(ours), weights_of(theirs)
    found += sorted(weights.keys() ^ finals.keys())
    # Ten steps of at most 1e-3 each: a step that is missing or doubled shows.
    both = sorted(weights.keys() & finals.keys())
    return found + [name for name in both if (weights[name] - finals[name]).abs().max() >= 1e-4]


def test_the_weights_in_rows_train_as_on_one_process(full_run, single):
    for kind, processes in (("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("zero3", 3)):
        run = full_run(f"{kind}{processes}", kind, processes)
        assert unlike(run, single, loss=1e-6) == []
        files = {path.name for path in run.checkpoints.glob("*/weights/*")}
        assert len(files) == (1 if kind == "ddp" else processes)


def test_full_fine_tuning_is_a_plain_loops(full_run, tied_model):
    """transformers' model, torch's AdamW with the groups of transformers' Trainer, and no more."""
    run = full_run("ours", "single", 1, schedule={"steps": 6, "kind": "constant"})
    _, spec = open_run(run.root)
    samples = open_corpus(run, spec).train
    model = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    ours = [record for (kind, _), record in records(run).items() if kind == "train"]
    for record in ours:
        targets, total = 0, torch.zeros(())
        optimizer.zero_grad()
        for index in record["samples"]:
            ids = torch.tensor(samples[index].ids).long()[None]
            learned = torch.tensor(samples[index].learned)[1:]
            logits = model(input_ids=ids).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            total = total + losses[learned].sum()
            targets += int(learned.sum())
        loss = total / targets
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        assert float.fromhex(record["loss"]) == pytest.approx(loss.item(), rel=1e-6)
        assert float.fromhex(record["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"model__dtype": "bf16"}, marks=pytest.mark.matrix)],
    ids=["fp32", "bf16"],
)
def test_a_resumed_run_is_the_unbroken_one(config, full_run, qlora, stop, tied_model, changes):
    whole = full_run("whole", "fsdp", 2, **changes)
    path = config(
        "half",
        **{**FULL, **changes},
        model__source=str(tied_model),
        strategy__kind="fsdp",
        resources__processes_per_node=2,
    )
    qlora("run", path, "--prepare")
    half = RunDir(path.with_suffix(""))
    code, output = stop("resume", half.root, count=5)
    assert code == 85, output
    qlora("resume", half.root)
    assert differences(whole, half) == []


def test_the_comparison_sees_rows_that_are_exchanged(full_run):
    """A resume that gave a process another's rows would be seen."""
    run = full_run("run", "fsdp", 2)
    before = fingerprint(run)
    newest = checkpoints.committed_paths(run.checkpoints)[0]
    files = [newest / "weights" / f"0000{rank}.safetensors" for rank in range(2)]
    files[0].rename(newest / "aside")
    files[1].rename(files[0])
    (newest / "aside").rename(files[1])
    after = fingerprint(run)
    assert before["weights"] != after["weights"]
    assert before["optimizer"] == after["optimizer"]


def test_a_run_changes_its_strategy_and_its_processes(config, single, qlora, stop, tied_model):
    """fsdp on two processes, one process, fsdp on three: the samples and losses of one run."""
    path = config(
        "half",
        **FULL,
        model__source=str(tied_model),
        strategy__kind="fsdp",
        resources__processes_per_node=2,
    )
    qlora("run", path, "--prepare")
    run = RunDir(path.with_suffix(""))
    one = ("strategy.kind=single", "resources.processes_per_node=1")
    three = ("strategy.kind=fsdp", "resources.processes_per_node=3")
    for overrides, count in ((), 4), (one, 8):
        code, output = stop("resume", run.root, *overrides, count=count)
        assert code == 85, output
    qlora("resume", run.root, *three)
    assert unlike(run, single, loss=1e-6) == []


def test_a_run_ends_with_a_model_that_transformers_loads(full_run, qlora, tied_model):
    run = full_run("run", "fsdp", 2, model__dtype="bf16")
    model, info = AutoModelForCausalLM.from_pretrained(
        run.model, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    loaded = dict(model.named_parameters())
    for name, tensor in weights_of(run).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(loaded[name], tensor.to(torch.bfloat16)), name
    assert (run.model / "tokenizer.json").is_file()
    assert not run.adapter.exists()
    answer = qlora("generate", run.root, "Question 3", "--max-new-tokens", "4")
    assert answer.stdout.strip()
    refused = qlora("export", run.root, code=2)
    assert "has no adapter to merge" in refused.stderr
    written = qlora("consolidate", run.root, "--checkpoint", "9").stdout
    assert "the model after step 9" in written
    (run.checkpoints / "step_000009" / "weights" / "00001.safetensors").unlink()
    refused = qlora("consolidate", run.root, "--checkpoint", "9", code=1)
    assert "00001" in refused.stderr
    assert json.loads((run.model / "training.json").read_text())["step"] == 9


@pytest.mark.parametrize("kind", ["nf4", pytest.param("none", marks=pytest.mark.matrix)])
def test_an_adapter_in_rows_is_the_whole_one(config, qlora, stop, kind):
    """Sums have another order, and each process saves its rows; all else is the same."""
    changes = {"quantization__kind": kind, "strategy__kind": "fsdp", "adapter__dropout": 0}
    paths = [
        config(name, **changes, strategy__shard_adapter=cut)
        for name, cut in (("whole", False), ("rows", True))
    ]
    runs = [RunDir(path.with_suffix("")) for path in paths]
    qlora("run", paths[0])
    qlora("run", paths[1], "--prepare")
    code, output = stop("resume", runs[1].root, "strategy.shard_adapter=false", count=5)
    assert code == 85, output
    qlora("resume", runs[1].root, "strategy.shard_adapter=true")
    assert unlike(runs[1], runs[0], loss=1e-6) == []
    newest = checkpoints.committed_paths(runs[1].checkpoints)[0]
    assert len(list((newest / "weights").iterdir())) == 2
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in runs)
    assert {name: t.shape for name, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
