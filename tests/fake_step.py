"""A training step on tensors without memory, and how much it would have held at once."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from qlora_dist.memory import WORKSPACE_BYTES
from qlora_dist.sizes import DROPOUT_PARTS_BYTES, NF4_BLOCK
from qlora_dist.train import adapters, dropout, lora, pointwise
from qlora_dist.train.batch import Batch
from qlora_dist.train.load import DTYPES, empty_base, put_whole
from qlora_dist.train.method import dtype_of_weights, make_trainable
from qlora_dist.train.nf4 import Nf4Tensor
from qlora_dist.train.objective import summed_loss
from qlora_dist.train.quantise import Constants, Nested
from qlora_dist.train.trained import Gradients

# torch's allocator hands out multiples of this.
ROUND = 512

_ATEN = torch.ops.aten
# What takes a CPU long in bf16: results have their shapes, and no values.
_PRODUCTS = {
    _ATEN.mm.default: lambda a, b: a.new_empty(a.shape[0], b.shape[1]),
    _ATEN.mm.out: lambda a, b, *, out: out,
    _ATEN.addmm.default: lambda c, a, b, **_: a.new_empty(a.shape[0], b.shape[1]),
    _ATEN.addmm_.default: lambda c, a, b, **_: c,
}


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at once."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._storages = {}

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        out = _PRODUCTS.get(func, func)(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self._add(leaf)
        extra = 0
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            # On a GPU it dequantises the matrix, and doubly quantised constants before.
            rows, width = args[2]
            nested = (kwargs or {}).get("absmax_8bit") is not None
            extra = rows * width * args[0].element_size() + nested * rows * width // 64 * 4
        self.peak = max(self.peak, self.bytes() + extra)
        return out

    def bytes(self):
        """What is held now. FSDP2 takes memory away from storages that stay."""
        sizes = (storage.nbytes() for ref in self._storages.values() if (storage := ref()))
        return sum(-(-size // ROUND) * ROUND for size in sizes)

    def _add(self, leaf):
        if not isinstance(leaf, torch.Tensor):
            return
        if is_traceable_wrapper_subclass(leaf):
            for name in leaf.__tensor_flatten__()[0]:
                self._add(getattr(leaf, name))
            return
        storage = leaf.untyped_storage()
        key = id(storage)
        if leaf.device.type != "meta" and key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._storages.pop(key))


def step_bytes(spec, *, attention):
    """The peak of a step with the longest batch, as torch's allocator would report it.

    CPU tensors stand for those of a GPU, so what differs there is set to what a GPU does.
    """
    dtype, device = DTYPES[spec.model.dtype], torch.device("cpu")
    with as_on_a_gpu(autocast=dtype == torch.bfloat16):
        base = empty_base(spec, attention=attention, dtype=dtype_of_weights(spec))
        model, _ = make_trainable(base.model, spec, device=torch.device("meta"))
        with FakeTensorMode(), Held() as held:
            for slot in base.slots:
                put_whole(slot, _weight(slot, base.dtype, device))
            for module in model.modules():
                for name, tensor in {**module._parameters, **module._buffers}.items():
                    if tensor is not None and not isinstance(tensor, torch._subclasses.FakeTensor):
                        _replace(module, name, tensor)
            parameters = adapters.trainable(model)
            moments = [
                torch.empty_like(p)
                for p in parameters.values()
                for _ in range(2 * (spec.optimizer.kind == "adamw"))
            ]
            Gradients(parameters)
            forward_and_backward(model, spec, dtype, device)
            del moments
            return held.peak + WORKSPACE_BYTES


@contextmanager
def kernels_without_memory() -> Iterator[None]:
    """What is one kernel on a GPU has its results here, without their values, and nothing else."""

    def like(*tensors):
        return tuple(torch.empty_like(tensor) for tensor in tensors)

    def normalised(x, _):
        return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)

    def dequantised(weight, rows, columns, dtype):
        return weight.packed.new_empty(rows[1] - rows[0], columns[1] - columns[0], dtype=dtype)

    def outer(grad, x, _, __):
        # The sum's parts, and the sum.
        parts = x.new_empty(DROPOUT_PARTS_BYTES, dtype=torch.uint8)
        del parts
        return x.new_empty(grad.shape[1], x.shape[1], dtype=torch.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointwise, "normalised", normalised)
        patch.setattr(pointwise, "normalised_backward", lambda _, x, __: torch.empty_like(x))
        patch.setattr(pointwise, "gated", lambda gate, _: torch.empty_like(gate))
        patch.setattr(pointwise, "gated_backward", lambda _, gate, up: like(gate, up))
        patch.setattr(lora, "dequantised", dequantised)
        patch.setattr(dropout, "draw_seed", int)
        patch.setattr(dropout, "inner", lambda x, a, _, __: x.new_empty(len(x), len(a)))
        patch.setattr(dropout, "outer", outer)
        patch.setattr(dropout, "add_back", lambda *_: None)
        yield


@contextmanager
def as_on_a_gpu(*, autocast: bool) -> Iterator[None]:
    """Dropout keeps a mask of bytes, autocast is CUDA's, kernels take no memory of their own."""

    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, training)[0] if training and p else x

    with pytest.MonkeyPatch.context() as patch, kernels_without_memory():
        patch.setattr(torch.nn.functional, "dropout", dropout)
        if autocast:
            # Without a device it asks for CUDA's.
            asked = torch.is_autocast_enabled
            patch.setattr(torch, "is_autocast_enabled", lambda *of: asked(*of) if of else True)
        patch.setattr(
            adapters, "_initial", lambda _, shape, seed: torch.empty(shape, device="meta")
        )
        yield


def _weight(slot, dtype, device):
    old = slot.module._parameters[slot.name]
    if not isinstance(old, Nf4Tensor):
        return torch.empty(old.shape, dtype=dtype, device=device)
    packed, absmax = (torch.empty(p.shape, dtype=p.dtype) for p in (old.packed, old.absmax))
    blocks, nested = old.numel() // NF4_BLOCK, None
    if absmax.numel() == blocks:
        nested = Nested(torch.empty(-(-blocks // 256)), torch.empty(256), torch.empty(()))
    constants = Constants(tuple(old.shape), dtype, torch.empty(16), nested)
    return Nf4Tensor(packed, absmax, constants, dtype)


def _replace(module, name, tensor):
    if isinstance(tensor, Nf4Tensor):
        return
    new = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, torch.nn.Parameter):
        if tensor.requires_grad:
            module._parameters[name] = torch.nn.Parameter(new)
    else:
        module._buffers[name] = new


def forward_and_backward(model, spec, dtype, device):
    """One pass each way over the longest batch of a spec."""
    rows, seq = spec.batch.micro_size, spec.data.sequence_tokens
    ids = torch.zeros(rows, seq, dtype=torch.int64, device=device)
    batch = Batch(ids, ids[:, 1:].clone(), {})
    autocast = torch.autocast("cpu", dtype, cache_enabled=False)
    with autocast if dtype == torch.bfloat16 else nullcontext():
        loss = summed_loss(model, batch) / 100
    loss.backward()
