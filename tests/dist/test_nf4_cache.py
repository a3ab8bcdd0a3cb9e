"""A base that is quantised once: what transformers loads, what a run resumes from, and its damage."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_dist.layout import RunDir
from qlora_dist.train.compare import differences
from tests.nf4_of_transformers import load_nf4


@pytest.fixture
def cached(config, tmp_path):
    """A config of two sharded processes whose base is kept in NF4."""

    def write(name="run", **changes):
        return config(
            name,
            **{
                "strategy__kind": "fsdp",
                "quantization__kind": "nf4",
                "quantization__cache_dir": str(tmp_path / "nf4"),
                **changes,
            },
        )

    return write


def the_cache(tmp_path):
    (path,) = (tmp_path / "nf4").iterdir()
    return path


def flip(path, back=1):
    """Change one byte of a file, some bytes from its end."""
    with path.open("r+b") as file:
        file.seek(-back, 2)
        byte = file.read(1)
        file.seek(-back, 2)
        file.write(bytes([byte[0] ^ 1]))


def test_transformers_loads_what_quantize_writes(cached, qlora, tmp_path, tiny_model):
    done = qlora("quantize", cached())
    cache = the_cache(tmp_path)
    assert f"{cache}: the base in NF4" in done.stdout
    before = (cache / "manifest.json").stat().st_mtime_ns
    qlora("quantize", cached())
    assert (cache / "manifest.json").stat().st_mtime_ns == before
    theirs = load_nf4(tiny_model).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(cache).state_dict()
    assert set(loaded) == set(theirs)
    for name, tensor in theirs.items():
        if "quant_state" in name:
            ours, other = (json.loads(bytes(t.numpy())) for t in (loaded[name], tensor))
            assert ours == other
        else:
            assert torch.equal(loaded[name], tensor), name


@pytest.mark.matrix
def test_a_run_from_the_cache_is_the_run_from_the_published_base(cached, config, qlora, tmp_path):
    plain = config("plain", strategy__kind="fsdp")
    qlora("run", plain)
    done = qlora("run", cached("first"))
    assert "quantising into" in done.stdout
    done = qlora("run", cached("second"))
    assert "quantising into" not in done.stdout
    for name in ("first", "second"):
        assert differences(RunDir(plain.with_suffix("")), RunDir(tmp_path / name)) == []


@pytest.mark.matrix
def test_a_damaged_cache_is_found_and_made_again(cached, qlora, tmp_path):
    qlora("run", cached("whole"))
    cache = the_cache(tmp_path)
    (file,) = cache.glob("*.safetensors")
    flip(file, back=file.stat().st_size // 2)
    done = qlora("run", cached("flipped"))
    assert "changed after it was written; quantising again" in done.stdout
    flip_size = file.stat().st_size - 1
    with file.open("r+b") as damaged:
        damaged.truncate(flip_size)
    done = qlora("run", cached("cut"))
    assert "is missing, truncated or grown; quantising again" in done.stdout
    for name in ("flipped", "cut"):
        assert differences(RunDir(tmp_path / "whole"), RunDir(tmp_path / name)) == []
    assert [path.name for path in (tmp_path / "nf4").iterdir()] == [cache.name]


@pytest.mark.matrix
def test_another_base_is_another_cache(cached, qlora, tmp_path, tiny_model):
    qlora("quantize", cached())
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.layers[0].mlp.gate_proj.weight.data += 0.01
    model.save_pretrained(other)
    for file in Path(tiny_model).glob("*token*"):
        (other / file.name).write_bytes(file.read_bytes())
    qlora("quantize", cached(model__source=str(other)))
    qlora("quantize", cached(quantization__double=False))
    assert len(list((tmp_path / "nf4").iterdir())) == 3


@pytest.mark.matrix
@pytest.mark.parametrize("moment", ["quantising#5", "loading#5"])
def test_a_run_that_is_killed_while_it_loads_goes_on_exactly(cached, qlora, tmp_path, moment):
    """Nothing of a cache that was not finished is left to be taken for one."""
    qlora("run", cached("whole"))
    cache = the_cache(tmp_path)
    for file in cache.iterdir():
        file.unlink()
    cache.rmdir()
    path = cached("broken")
    qlora("run", path, code=1, env={"QLORA_FAULT": f"{moment}=sigkill"})
    qlora("run", path)
    assert differences(RunDir(tmp_path / "whole"), RunDir(tmp_path / "broken")) == []
    assert [path.name for path in (tmp_path / "nf4").iterdir()] == [cache.name]


@pytest.mark.matrix
def test_a_copy_on_the_node_is_read_and_a_damaged_or_impossible_one_is_not(cached, qlora, tmp_path):
    near = {"QLORA_LOCAL_DIR": str(tmp_path / "job-$SLURM_JOB_ID"), "SLURM_JOB_ID": "7"}
    qlora("run", cached("whole"))
    qlora("run", cached("near"), env=near)
    (copy,) = (tmp_path / "job-7").iterdir()
    assert copy.name == the_cache(tmp_path).name
    (file,) = copy.glob("*.safetensors")
    flip(file, back=file.stat().st_size // 2)
    done = qlora("run", cached("flipped"), env=near)
    assert "changed after it was written; reading" in done.stdout
    assert "quantising again" not in done.stdout
    assert not copy.exists()
    done = qlora("run", cached("nowhere"), env={"QLORA_LOCAL_DIR": "/proc/nowhere"})
    assert "model: no copy on this node, reading" in done.stdout
    done = qlora("run", cached("unknown"), env={"QLORA_LOCAL_DIR": "/$SCRATCH_OF_NOBODY"})
    assert "model: no copy on the nodes: local_dir is '/$SCRATCH_OF_NOBODY'" in done.stdout
    # A node that died while it wrote: the right sizes, and nothing in them.
    qlora("run", cached("again"), env=near)
    size = file.stat().st_size
    file.write_bytes(bytes(size))
    qlora("run", cached("zeros"), env=near)
    assert file.read_bytes() != bytes(size)
    for name in ("near", "flipped", "nowhere", "unknown", "again", "zeros"):
        assert differences(RunDir(tmp_path / "whole"), RunDir(tmp_path / name)) == []


def test_a_rank_that_dies_while_loading_ends_the_others_within_a_minute(cached, qlora, tmp_path):
    begin = time.monotonic()
    done = qlora("run", cached(), code=1, env={"QLORA_FAULT": "loading#3@1=sigkill"})
    assert "rank 1" in done.stderr
    assert "killed, or crashed outside Python" in done.stderr
    assert time.monotonic() - begin < 60 + 30


def test_a_cache_folder_without_room(cached, qlora, tmp_path):
    done = qlora("quantize", cached(quantization__cache_dir="/proc/nowhere"), code=1)
    assert "/proc/nowhere" in done.stderr
