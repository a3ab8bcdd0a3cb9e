"""A linear layer whose NF4 weight is a matrix of bytes that can be cut by rows.

In bitsandbytes a quantised matrix is flat, with its constants beside it as one object. Here both
are matrices of bytes with a row for each output, so that a process can hold and send the rows that
it owns alone, and every process computes with exactly the bytes that bitsandbytes would have made
of the whole matrix. The product is bitsandbytes' own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from torch import nn

from qlora_dist.train.quantise import Constants, absmax_bytes

_ATEN = torch.ops.aten


class Nf4Tensor(torch.Tensor):
    """Rows of a quantised matrix; to torch a ``(rows, in)`` tensor of the dtype that it stands for.

    FSDP2 cuts it by rows, and gathers its two parts as the bytes that they are. (Stored as bf16, as
    other tools do it, 0.08 % of the bytes come back changed: those that spell a NaN.)

    Attributes:
        packed: uint8 ``(rows, in / 2)``, two weights a byte.
        absmax: uint8 ``(rows, in / 64)``; without double quantisation the bytes of float32 values,
            ``(rows, in / 16)``.
        constants: Of the whole matrix; None on the meta device.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    constants: Constants | None
    # What PEFT asks a 4-bit weight for.
    quant_type = "nf4"

    def __new__(  # noqa: D102 - the class says it
        cls: type["Nf4Tensor"],
        packed: torch.Tensor,
        absmax: torch.Tensor,
        constants: Constants | None,
        dtype: torch.dtype,
        shape: torch.Size | None = None,
    ) -> "Nf4Tensor":
        shape = torch.Size((packed.shape[0], packed.shape[1] * 2)) if shape is None else shape
        made: Nf4Tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=(shape[1], 1) if len(shape) == 2 else (1,),
            dtype=dtype,
            device=packed.device,
            requires_grad=False,
        )
        made.packed, made.absmax, made.constants = packed, absmax, constants
        return made

    @classmethod
    def empty(cls, rows: int, width: int, dtype: torch.dtype, *, double: bool) -> "Nf4Tensor":
        """One without memory, on the meta device."""
        packed = torch.empty(rows, width // 2, dtype=torch.uint8, device="meta")
        size = absmax_bytes(width, double=double)
        absmax = torch.empty(rows, size, dtype=torch.uint8, device="meta")
        return cls(packed, absmax, None, dtype)

    @property
    def compress_statistics(self) -> bool:
        """Whether the constants are quantised too; PEFT asks for it."""
        return self.constants is not None and self.constants.nested is not None

    def state(self) -> QuantState:
        """The matrix as bitsandbytes describes it; this must hold every row."""
        assert self.constants is not None
        return self.constants.state(self.absmax)

    def flat(self) -> torch.Tensor:
        """The packed bytes as bitsandbytes has them, ``(out * in / 2, 1)``."""
        assert self.constants is not None
        rows, width = self.constants.shape
        return self.packed.reshape(-1)[: rows * width // 2].view(-1, 1)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Nf4Tensor({tuple(self.shape)}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["packed", "absmax"], (self.constants, self.dtype, self.shape)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], context: Any, _size: object, _stride: object
    ) -> "Nf4Tensor":
        return Nf4Tensor(inner["packed"], inner["absmax"], *context)

    def fsdp_pre_all_gather(self, *_: object) -> tuple[tuple[torch.Tensor, ...], Any]:
        """What FSDP2 is to gather."""
        return (self.packed, self.absmax), (self.constants, self.dtype)

    def fsdp_post_all_gather(
        self,
        gathered: tuple[torch.Tensor, ...],
        context: Any,
        _dtype: torch.dtype,
        *,
        out: "Nf4Tensor | None" = None,
    ) -> tuple["Nf4Tensor", tuple[torch.Tensor, ...]] | None:
        """The whole matrix, made of what was gathered."""
        if out is not None:
            # FSDP2 has filled the same memory again, of which ``out`` is a view.
            return None
        packed, absmax = gathered
        return Nf4Tensor(packed, absmax, *context), gathered

    def _each(
        self, change: Callable[[torch.Tensor], torch.Tensor], shape: torch.Size | None = None
    ) -> "Nf4Tensor":
        return Nf4Tensor(
            change(self.packed), change(self.absmax), self.constants, self.dtype, shape
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            raise NotImplementedError(f"Nf4Tensor: {func}")
        return handler(func, *args, **(kwargs or {}))


def _same(func: Any, tensor: Nf4Tensor, **_: object) -> Nf4Tensor:
    return tensor._each(func, tensor.shape)


def _view(_: Any, tensor: Nf4Tensor, size: list[int]) -> Nf4Tensor:
    assert size in ([-1], [tensor.numel()], list(tensor.shape)), size
    flat = torch.Size((tensor.numel(),))
    return tensor._each(lambda part: part, flat if len(size) == 1 else tensor.shape)


def _split(_: Any, tensor: Nf4Tensor, rows: int, dim: int = 0) -> list[Nf4Tensor]:
    assert dim == 0
    parts = zip(torch.split(tensor.packed, rows), torch.split(tensor.absmax, rows), strict=True)
    return [Nf4Tensor(*part, tensor.constants, tensor.dtype) for part in parts]


def _new_zeros(_: Any, tensor: Nf4Tensor, size: list[int], **_kwargs: object) -> torch.Tensor:
    if len(size) == 2:
        assert size[1] == tensor.shape[-1]
        return tensor._each(lambda part: part.new_zeros(size[0], part.shape[1]))
    return torch.zeros(size, dtype=tensor.dtype, device=tensor.device)


def _slice(
    _: Any, tensor: Nf4Tensor, dim: int = 0, start: int | None = None, end: int | None = None
) -> Nf4Tensor:
    if dim == 0:
        return tensor._each(lambda part: part[start:end])
    assert not start
    assert end is None or end >= tensor.shape[dim]
    return tensor._each(lambda part: part, tensor.shape)


def _as_strided(
    _: Any, tensor: Nf4Tensor, size: list[int], stride: list[int], offset: int | None = None
) -> Nf4Tensor:
    assert list(size) == list(tensor.shape)
    assert not offset
    return tensor._each(lambda part: part, tensor.shape)


def _copy(_: Any, tensor: Nf4Tensor, source: Nf4Tensor, _non_blocking: bool = False) -> Nf4Tensor:
    assert tensor.shape == source.shape
    tensor.packed.copy_(source.packed)
    tensor.absmax.copy_(source.absmax)
    return tensor


def _to_copy(
    _: Any,
    tensor: Nf4Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **_kwargs: object,
) -> Nf4Tensor:
    # A cast would make ordinary numbers of it, at four times the memory.
    assert dtype in (None, tensor.dtype), f"an NF4 weight is not cast to {dtype}"
    place = tensor.device if device is None else device
    return tensor._each(lambda part: part.to(place, non_blocking=non_blocking), tensor.shape)


def _empty_like(
    _: Any, tensor: Nf4Tensor, *, device: torch.device | None = None, **_kwargs: object
) -> Nf4Tensor:
    place = tensor.device if device is None else device
    return tensor._each(lambda part: torch.empty_like(part, device=place), tensor.shape)


def _is_pinned(_: Any, tensor: Nf4Tensor, *_args: object) -> bool:
    return tensor.packed.is_pinned() and tensor.absmax.is_pinned()


def _pin_memory(_: Any, tensor: Nf4Tensor, *_args: object) -> Nf4Tensor:
    return tensor._each(torch.Tensor.pin_memory, tensor.shape)


# What FSDP2, PEFT and nn.Module do to a weight.
_HANDLERS: dict[Any, Callable[..., Any]] = {
    _ATEN.detach.default: _same,
    _ATEN.alias.default: _same,
    _ATEN.clone.default: _same,
    _ATEN.view.default: _view,
    _ATEN.split.Tensor: _split,
    _ATEN.new_zeros.default: _new_zeros,
    _ATEN.slice.Tensor: _slice,
    _ATEN.as_strided.default: _as_strided,
    _ATEN.copy_.default: _copy,
    _ATEN._to_copy.default: _to_copy,
    _ATEN.empty_like.default: _empty_like,
    _ATEN.is_pinned.default: _is_pinned,
    _ATEN._pin_memory.default: _pin_memory,
}


class Nf4Linear(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
    """A frozen linear layer whose weight is an :class:`Nf4Tensor`; PEFT takes it for bitsandbytes'.

    Args:
        like: The layer that it stands for, on the meta device.
        rows: Rows of the weight, with those that only fill up the last process's part.
        dtype: Of the weight and of the computation.
        double: Whether the constants are quantised too.
    """

    def __init__(self, like: nn.Linear, rows: int, dtype: torch.dtype, *, double: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.compute_dtype = dtype
        empty = Nf4Tensor.empty(rows, like.in_features, dtype, double=double)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.register_parameter("bias", like.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + b`` with bitsandbytes' product.

        Args:
            x: ``(..., in)``.

        Returns:
            ``(..., out)``, in the dtype of ``x``.
        """
        weight: Nf4Tensor = self.weight  # type: ignore[assignment]
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        inner = x.to(self.compute_dtype)
        y = bitsandbytes.matmul_4bit(inner, weight.flat(), bias=bias, quant_state=weight.state())
        result: torch.Tensor = y.to(x.dtype)
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Nf4Bytes(Nf4Linear):
    """The same layer with its weight as two plain parameters of bytes, for whoever cuts these.

    Attributes:
        packed: As in :class:`Nf4Tensor`; its shape may be another while it is cut.
        absmax: The same.
    """

    packed: nn.Parameter
    absmax: nn.Parameter
    constants: Constants

    @classmethod
    def of(cls, layer: Nf4Linear, constants: Constants | None) -> "Nf4Bytes":
        """Make this of a layer in place, whose bytes follow."""
        assert constants is not None
        del layer._parameters["weight"]
        layer.__class__ = cls
        assert isinstance(layer, Nf4Bytes)
        layer.constants = constants
        return layer

    @property
    def weight(self) -> Nf4Tensor:  # type: ignore[override]
        """The matrix, whole where the bytes are."""
        rows, width = self.constants.shape
        shape = torch.Size((rows, width))
        return Nf4Tensor(self.packed, self.absmax, self.constants, self.compute_dtype, shape)
