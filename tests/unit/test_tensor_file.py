"""Our safetensors files are what the library reads."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_dist.train.tensor_file import DTYPES, Entry, write_tensors


def test_every_dtype_and_odd_shape_reads_back_bit_for_bit(tmp_path):
    tensors = {
        f"{name}.{shape}": (torch.rand(shape) * 100).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in ((), (3,), (2, 5), (0, 4), (7, 1, 3))
    }
    tensors["transposed"] = torch.rand(4, 6).T
    path = tmp_path / "x.safetensors"
    sha256 = write_tensors(
        path, {k: Entry.of(t) for k, t in tensors.items()}, metadata={"format": "pt"}
    )
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    back = load_file(path)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_disk_that_refuses_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        write_tensors(tmp_path / "none" / "x", {"a": Entry.of(torch.zeros(1))})
