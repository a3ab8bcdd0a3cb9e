"""An export is base + adapter, tensor by tensor, and its figures are what anybody would measure."""

import json
import math
import re
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.errors import ModelError
from qlora_dist.layout import RunDir, open_run
from qlora_dist.train import measure
from qlora_dist.train.export import export
from qlora_dist.train.ticker import Ticker
from tests.nf4_of_transformers import load_nf4

QUICK = {
    "schedule__steps": 2,
    "schedule__warmup_steps": 0,
    "strategy__kind": "single",
    "resources__processes_per_node": 1,
    "optimizer__lr": 1e-2,
}


@pytest.fixture(scope="module")
def measured(whole_run, tmp_path_factory):
    """The whole run, exported with --base auto: folder, lines, figures. Not to be changed."""
    folder = tmp_path_factory.mktemp("export") / "merged"
    run, spec = open_run(whole_run.root)
    lines = []
    export(run, spec, folder, Ticker(lines.append))
    return folder, lines, json.loads((folder / "export.json").read_text())


@pytest.fixture
def trained(config, qlora):
    """Train a small config for two steps."""

    def go(name, **changes):
        path = config(name, **QUICK | changes)
        qlora("run", path)
        return RunDir(path.with_suffix(""))

    return go


def weights(folder):
    """Every tensor of a model folder."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def products(run):
    """What the adapter adds to each tensor, float32."""
    _, spec = open_run(run.root)
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    scale = spec.adapter.alpha / spec.adapter.r
    return {
        key.removeprefix("base_model.model.").replace(".lora_A.", "."): scale
        * (adapter[key.replace(".lora_A.", ".lora_B.")] @ down)
        for key, down in adapter.items()
        if ".lora_A." in key
    }


def quantised_base(run):
    """The base as bitsandbytes makes it, by transformers alone."""
    _, spec = open_run(run.root)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec.model.dtype]
    return load_nf4(spec.model.source, double=spec.quantization.double, dtype=dtype)


def dequantised(run):
    """The matrices that the base holds in NF4, as its forward pass computes with them."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    return {
        f"{name}.weight": dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in quantised_base(run).named_modules()
        if isinstance(layer, Linear4bit)
    }


def assert_merged(folder, base, run):
    """Each tensor of the folder is ``base`` + the adapter's product, rounded once."""
    found, added = weights(folder), products(run)
    assert set(found) == set(base)
    assert set(added) < set(base)
    for name, weight in base.items():
        wanted = weight.float() + added[name] if name in added else weight
        assert torch.equal(found[name], wanted.to(torch.bfloat16)), name


def log_probs(model, samples):
    """float64 of shape ``(targets, vocab)``, and the targets."""
    found, targets = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.ids).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        for place in range(1, len(ids)):
            if sample.learned[place]:
                found.append(logits[place - 1].double().log_softmax(-1))
                targets.append(ids[place])
    return torch.stack(found), torch.stack(targets)


def nothing_left(run):
    return not [path for path in run.root.iterdir() if path.name.startswith("merged")]


def test_16bit_is_the_published_base_plus_the_adapters_product(whole_run, copy_of, qlora):
    run = copy_of(whole_run)
    done = qlora("export", run.root, "--base", "16bit")
    assert "the 16bit base with the adapter merged into 14 matrices" in done.stdout
    _, spec = open_run(run.root)
    assert_merged(run.merged, load_file(f"{spec.model.source}/model.safetensors"), run)
    assert json.loads((run.merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((run.merged / "export.json").read_text())["base"] == "16bit"


def test_dequantized_is_what_training_computed_with(whole_run, copy_of, qlora):
    run = copy_of(whole_run)
    done = qlora("export", run.root, "--base", "dequantized", "--no-check")
    assert "KL" not in done.stdout
    _, spec = open_run(run.root)
    base = load_file(f"{spec.model.source}/model.safetensors")
    again = dequantised(whole_run)
    assert len(again) == 14
    assert all((again[name] - base[name]).abs().max() > 1e-3 for name in again)
    assert_merged(run.merged, base | again, run)
    assert json.loads((run.merged / "export.json").read_text())["measured"] is None


def test_auto_measures_both_and_takes_the_lower_kl(whole_run, measured):
    folder, lines, mark = measured
    found = mark["measured"]
    assert found["dequantized"]["kl_nats"] < found["16bit"]["kl_nats"]
    assert (mark["base"], mark["base_asked_for"]) == ("dequantized", "auto")
    for kind in ("16bit", "dequantized"):
        kl, perplexity = found[kind]["kl_nats"], found[kind]["perplexity"]
        assert any(f"{kind}: KL {kl:.3e}" in x and f"{perplexity:.4f}" in x for x in lines)
    assert f"perplexity {found['trained']['perplexity']:.4f} on 138 target tokens" in lines[1]
    assert "6 held-out samples" in lines[1]
    assert lines[-1] == "dequantized is nearer to the trained model"
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]
    base = load_file(f"{mark['spec']['model']['source']}/model.safetensors")
    assert_merged(folder, base | dequantised(whole_run), whole_run)


def test_the_figures_are_those_of_a_plain_computation(whole_run, measured, tmp_path):
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _, mark = measured
    run, spec = open_run(whole_run.root)
    samples = measure.choose_rows(run, spec).samples
    model = PeftModel.from_pretrained(quantised_base(run), run.adapter)
    model.eval()
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # Out of training mode, on CPUs with AVX-512 BF16, it computes with other kernels.
            layer.train()
    wanted, targets = log_probs(model, samples)
    export(run, spec, tmp_path / "16bit", Ticker(lambda _: None), base="16bit", check=False)
    folders = {"dequantized": folder, "16bit": tmp_path / "16bit"}
    for kind, merged in folders.items():
        found, _ = log_probs(AutoModelForCausalLM.from_pretrained(merged, dtype="auto"), samples)
        kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
        assert mark["measured"][kind]["kl_nats"] == pytest.approx(kl, rel=1e-5, abs=1e-7)
        loss = -float(found.gather(1, targets[:, None]).mean())
        assert mark["measured"][kind]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    loss = -float(wanted.gather(1, targets[:, None]).mean())
    assert mark["measured"]["trained"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_one_wrong_matrix_shows_in_the_kl_and_a_missing_one_is_an_error(
    whole_run, measured, tmp_path
):
    folder, _, mark = measured
    run, spec = open_run(whole_run.root)
    quiet = Ticker(lambda _: None)
    rows = measure.choose_rows(run, spec)
    trained = measure.measure_trained(run, spec, rows, quiet)

    def figures(change):
        bad = tmp_path / "bad"
        shutil.copytree(folder, bad, dirs_exist_ok=True)
        tensors = weights(folder)
        change(tensors)
        save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
        return measure.measure_merged(bad, spec, rows, trained, quiet, name="bad")

    name = "model.layers.1.mlp.up_proj.weight"
    same = figures(lambda tensors: None)
    assert same.kl_nats == mark["measured"]["dequantized"]["kl_nats"]
    wrong = figures(lambda tensors: tensors[name].mul_(1.5))
    assert wrong.kl_nats > 10 * same.kl_nats
    with pytest.raises(ModelError, match="does not load whole.*missing_keys.*up_proj"):
        figures(lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match="does not load whole.*unexpected_keys.*stray"):
        figures(lambda tensors: tensors.update(stray=torch.zeros(1)))
    with pytest.raises(ModelError, match="not finite"):
        figures(lambda tensors: tensors[name].fill_(math.nan))


def test_a_tied_and_sharded_base_in_bf16_exports_right(trained, tiny_model, tmp_path, qlora):
    from transformers import AutoConfig, AutoModelForCausalLM

    base = tmp_path / "sharded"
    shutil.copytree(tiny_model, base, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="50KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    assert "lm_head.weight" not in weights(base)
    run = trained(
        "tied",
        model__source=str(base),
        model__dtype="bf16",
        quantization={"kind": "nf4", "double": False},
        adapter__target=["q_proj", "up_proj"],
    )
    for kind, changed in (("16bit", {}), ("dequantized", dequantised(run))):
        done = qlora("export", run.root, "--base", kind)
        assert f"the {kind} base with the adapter merged into 4 matrices" in done.stdout
        # All linear layers are quantised, adapted or not.
        assert_merged(run.merged, weights(base) | changed, run)
        files = {path.name for path in run.merged.glob("*.safetensors")}
        assert files == {path.name for path in base.glob("*.safetensors")}
        loaded = AutoModelForCausalLM.from_pretrained(run.merged, dtype="auto")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_plain_lora_has_a_16bit_base_only(trained, qlora):
    run = trained("lora", quantization={"kind": "none"}, data__validation_rows=0)
    done = qlora("export", run.root, "--base", "dequantized", code=2)
    assert "training quantised nothing; use --base 16bit" in done.stderr
    assert nothing_left(run)
    done = qlora("export", run.root)
    assert "there is only the 16bit base" in done.stdout
    assert "training samples of lora, which holds none out" in done.stdout
    mark = json.loads((run.merged / "export.json").read_text())
    assert mark["base"] == "16bit"
    assert 0 < mark["measured"]["16bit"]["kl_nats"] < 1e-3


def test_no_more_targets_than_the_limit_are_measured(whole_run, monkeypatch):
    run, spec = open_run(whole_run.root)
    quiet = Ticker(lambda _: None)
    everything = measure.measure_trained(run, spec, measure.choose_rows(run, spec), quiet)
    monkeypatch.setattr(measure, "MAX_TARGETS", 50)
    rows = measure.choose_rows(run, spec)
    some = measure.measure_trained(run, spec, rows, quiet)
    assert rows.num_targets == 50
    assert torch.equal(torch.cat(some.log_probs), torch.cat(everything.log_probs)[:50])


def test_auto_cannot_go_unmeasured(whole_run, copy_of, qlora):
    run = copy_of(whole_run)
    done = qlora("export", run.root, "--no-check", code=2)
    assert "use --base 16bit or --base dequantized" in done.stderr
    assert nothing_left(run)


def test_data_that_is_gone_is_an_error_that_says_how_to_do_without(trained, qlora, tmp_path):
    data = tmp_path / "gone.jsonl"
    data.write_text('{"input": "q", "output": "a"}\n' * 8)
    run = trained("gone", data__source=str(data), data__validation_rows=0)
    data.write_text("")
    done = qlora("export", run.root, code=2)
    assert "to export without measuring: --base 16bit --no-check" in done.stderr
    assert nothing_left(run)
    qlora("export", run.root, "--base", "16bit", "--no-check")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("layers.1.mlp", "layers.2.mlp"), r"lacks model\.layers\.2\.mlp\.down_proj\.weight"),
        (("lora_A", "lora_B"), r"0\.mlp\.down_proj\.weight of .* has shape \(64, 192\)"),
    ],
)
def test_an_adapter_for_another_base_leaves_nothing(whole_run, copy_of, qlora, names, message):
    run = copy_of(whole_run)
    path = run.adapter / "adapter_model.safetensors"
    # Both ways, so that no name is taken twice.
    there, back = dict([names, names[::-1]]), load_file(path)
    pattern = re.compile("|".join(there))
    changed = {pattern.sub(lambda m: there[m[0]], name): part for name, part in back.items()}
    save_file(changed, path)
    done = qlora("export", run.root, "--base", "16bit", "--no-check", code=2)
    assert re.search(message, done.stderr)
    assert nothing_left(run)


@contextmanager
def largest_file(size):
    """No process may write a file beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_error_leaves_the_export_that_was_there(whole_run, copy_of, qlora):
    run = copy_of(whole_run)
    with largest_file(100_000):
        done = qlora("export", run.root, "--base", "16bit", "--no-check", code=1)
    assert "cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert nothing_left(run)
    qlora("export", run.root, "--base", "16bit", "--no-check")
    before = weights(run.merged)
    with largest_file(100_000):
        qlora("export", run.root, "--base", "dequantized", "--no-check", code=1)
    assert [p.name for p in run.root.iterdir() if p.name.startswith("merged")] == ["merged"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run.merged).items())


@pytest.mark.parametrize("stage", ["writing dequantized", "measuring dequantized"])
def test_an_interrupt_leaves_nothing(whole_run, copy_of, stage):
    run, spec = open_run(copy_of(whole_run).root)

    def interrupt(line):
        if line.startswith(stage):
            assert (run.root / "merged.partial" / "16bit").is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run, spec, run.merged, Ticker(interrupt))
    assert nothing_left(run)
