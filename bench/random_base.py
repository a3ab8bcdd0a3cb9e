"""Bases of real shapes with random weights in NF4, made without those in 16 bits (65B: 122 GiB)."""

import json
from pathlib import Path
from unittest import mock

import torch
from models import config_of, small_tokenizer

from qlora_dist.shapes import SHAPES
from qlora_dist.sizes import NESTED_BLOCK, NF4_BLOCK
from qlora_dist.train import nf4_cache
from qlora_dist.train.fill import WHOLE
from qlora_dist.train.nf4 import Nf4Tensor
from qlora_dist.train.quantise import Nested, constants

# Dequantised weights have about the spread of a trained model's.
SPREAD = 0.02


def write_config_of(shape_name, folder):
    """A model folder with its config.json and a tokenizer, and no weights yet."""
    folder.mkdir(parents=True, exist_ok=True)
    config_of(SHAPES[shape_name]).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def fill_random(base, spec, *, device, put, share=WHOLE, on_bytes=lambda *_: None, **_):
    """As ``fill_base``, with random weights: the same on every process for the same slot."""
    generator = torch.Generator(device)
    for number, slot in enumerate(base.slots):
        generator.manual_seed(number)
        put(slot, _rows(slot, spec, base.dtype, share, generator))
        on_bytes(number + 1, len(base.slots))
    for module in base.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _rows(slot, spec, dtype, share, generator):
    """This process's rows of a parameter."""
    device = generator.device
    first, count = share.rows(slot.shape[0])
    if not slot.is_nf4:
        if len(slot.shape) == 1:
            return torch.ones(count, dtype=dtype, device=device)
        whole = torch.empty(slot.shape, dtype=dtype, device=device)
        return whole.normal_(std=SPREAD, generator=generator)[first : first + count].clone()
    rows, width = share.per_rank(slot.shape[0]), slot.shape[1]
    blocks = slot.shape[0] * width // NF4_BLOCK
    nested, size = None, width // NF4_BLOCK * 4
    absmax = torch.full((rows, size // 4), 2 * SPREAD, device=device).view(torch.uint8)
    if spec.quantization.double:
        code = torch.linspace(-1, 1, 256, device=device)
        parts = torch.full((-(-blocks // NESTED_BLOCK),), SPREAD, device=device)
        nested = Nested(parts, code, torch.tensor(2 * SPREAD, device=device))
        absmax = _bytes(rows, width // NF4_BLOCK, generator)
    packed = _bytes(rows, width // 2, generator)
    more = constants((slot.shape[0], width), dtype, nested, device)
    return Nf4Tensor(packed, absmax, more, dtype)


def _bytes(rows, width, generator):
    return torch.randint(
        256, (rows, width), dtype=torch.uint8, device=generator.device, generator=generator
    )


def write_sparse_base(shape_name, folder):
    """A base whose 16-bit weights are a hole in a file: their names and sizes, and no bytes."""
    shape, names = SHAPES[shape_name], {}
    write_config_of(shape_name, folder)
    hidden = shape.hidden_size
    names["model.embed_tokens.weight"] = [shape.vocab_size, hidden]
    names["lm_head.weight"] = [shape.vocab_size, hidden]
    names["model.norm.weight"] = [hidden]
    for layer in range(shape.num_layers):
        own = f"model.layers.{layer}"
        names[f"{own}.input_layernorm.weight"] = [hidden]
        names[f"{own}.post_attention_layernorm.weight"] = [hidden]
        for name, sizes in shape.linears.items():
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            names[f"{own}.{part}.{name}.weight"] = list(sizes)
    header, offset = {}, 0
    for name, sizes in names.items():
        size = 2 * torch.Size(sizes).numel()
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return folder


def write_cache(spec, device) -> Path:
    """The cache of a spec's base, by the real writer, of random weights."""
    with mock.patch.object(nf4_cache, "fill_base", fill_random):
        return nf4_cache.ensure_cache(spec, device, say=print)
