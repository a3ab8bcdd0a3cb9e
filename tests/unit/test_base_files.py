"""Bases whose files are not what they should be, and whole ones that transformers stored."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.errors import ModelError
from qlora_dist.spec_file import spec_from_tree
from qlora_dist.train.load import load_base
from tests.nf4_of_transformers import load_nf4
from tests.unit.test_spec import GOOD

CPU = torch.device("cpu")


def spec_of(folder, *, double=True, kind="nf4", dtype="fp32"):
    quantization = {"kind": "nf4", "double": double} if kind == "nf4" else {"kind": "none"}
    model = {"source": str(folder), "dtype": dtype}
    return spec_from_tree({**GOOD, "model": model, "quantization": quantization}, source="test")


def load(folder, **options):
    return load_base(spec_of(folder, **options), device=CPU, attention="sdpa")


@pytest.fixture
def base(tiny_model, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "base")


def rewrite(base, change):
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


NORM, GATE = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"


def test_a_tensor_that_is_missing(base):
    rewrite(base, lambda tensors: tensors.pop(GATE))
    with pytest.raises(ModelError, match=rf"base lacks {GATE}"):
        load(base)


def test_a_tensor_too_many(base):
    rewrite(base, lambda tensors: tensors.update(odd=torch.zeros(2)))
    with pytest.raises(ModelError, match="holds, and the model has not, odd"):
        load(base)


def test_what_old_checkpoints_hold_and_nobody_needs(base):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(base, lambda tensors: tensors.update({name: torch.zeros(2)}))
    # The model's own, not what lies in the file.
    assert bool((load(base).model.rotary_emb.inv_freq > 0).all())


def test_a_tensor_of_another_shape(base):
    rewrite(base, lambda tensors: tensors.update({NORM: torch.zeros(3)}))
    with pytest.raises(ModelError, match=r"has other shapes: model.norm.weight is \(3,\)"):
        load(base)


def test_a_file_that_is_cut_short(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelError, match="is cut short"):
        load(base)


def test_a_file_that_is_none(base):
    (base / "model.safetensors").write_bytes(b"PK\3\4 not this")
    with pytest.raises(ModelError, match="cannot be read: no safetensors header"):
        load(base)


def test_an_index_that_names_a_file_that_is_not_there(base):
    index = {"metadata": {}, "weight_map": {NORM: "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"00002-of-00002.safetensors cannot be read"):
        load(base)


def test_a_folder_with_other_weights(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="convert the model with its save_pretrained"):
        load(base)


def test_a_tied_tensor_that_is_stored_twice(tiny_model, base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=r"differ, and config\.json ties them"):
        load(base)
    embedding = "model.embed_tokens.weight"
    rewrite(base, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    model = load(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def stored_by_transformers(base, folder, *, double):
    """The tiny model in NF4, as transformers saves it."""
    model = load_nf4(base, double=double)
    model.save_pretrained(folder)
    return model


def parts(weight, state):
    found = [weight, state.absmax, state.code]
    if state.nested:
        found += [state.offset, state.state2.absmax, state.state2.code]
    return found


@pytest.mark.parametrize("double", [True, False])
def test_our_bytes_are_those_that_transformers_loads(base, tmp_path, double):
    """From 16-bit files and from NF4 ones alike."""
    folder = tmp_path / "nf4"
    wanted = dict(stored_by_transformers(base, folder, double=double).named_parameters())
    for source in (base, folder):
        found = dict(load(source, double=double).named_parameters())
        assert set(found) == set(wanted)
        for name, parameter in wanted.items():
            if hasattr(parameter, "quant_state"):
                ours = parts(found[name].flat(), found[name].state())
                theirs = parts(parameter.data, parameter.quant_state)
            else:
                ours, theirs = [found[name]], [parameter]
            for mine, other in zip(ours, theirs, strict=True):
                assert torch.equal(mine.reshape(-1), other.reshape(-1)), name


def test_a_base_that_was_quantised_otherwise(base, tmp_path):
    stored_by_transformers(base, tmp_path / "nf4", double=True)
    with pytest.raises(ModelError, match=r"quantised with quantization\.double=true"):
        load(tmp_path / "nf4", double=False)
    with pytest.raises(ModelError, match="quantised otherwise than this run wants: dtype float32"):
        load(tmp_path / "nf4", dtype="bf16")
    with pytest.raises(ModelError, match=r"is stored as torch\.uint8"):
        load(tmp_path / "nf4", kind="none")


def test_storage_that_stops_answering_ends_the_process_with_its_name(base):
    """A read that hangs for good, as on a network file system whose server is gone."""
    code = f"""
import os, threading
import torch
from qlora_dist.train import base_files
from tests.unit.test_base_files import load
base_files._STALL_S = 2.0
real, calls = os.preadv, []
def preadv(*args):
    calls.append(args)
    if len(calls) > 5:
        threading.Event().wait()
    return real(*args)
os.preadv = preadv
load({str(base)!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "storage has given nothing for 2 s" in done.stderr.splitlines()[-1]
    assert "model.safetensors" in done.stderr.splitlines()[-1]
