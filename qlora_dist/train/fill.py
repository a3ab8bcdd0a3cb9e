"""Filling an empty model from its files: each process reads, quantises and keeps only its rows.

Every tensor is a job: pieces of bytes that are read ahead, and an end, at which the processes may
exchange what the second quantisation needs. All processes do the same jobs in the same order.
"""

import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from qlora_dist.errors import ModelError
from qlora_dist.sizes import NESTED_BLOCK, NF4_BLOCK
from qlora_dist.train.base_files import Piece, PieceReader, Stored, listed, pieces_of
from qlora_dist.train.nf4 import Nf4Linear, Nf4Tensor
from qlora_dist.train.quantise import (
    Nested,
    absmax_bytes,
    checksum,
    constants,
    nest,
    quantise_rows,
)

_STATE = "quant_state.bitsandbytes__nf4"
# What old checkpoints hold, and every model computes by itself.
_COMPUTED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Share:
    """Which rows of every tensor a process holds: those that FSDP2 gives it.

    Attributes:
        rank: Of the process, among those that share one model.
        size: How many they are.
    """

    rank: int = 0
    size: int = 1

    def per_rank(self, rows: int) -> int:
        """Rows of each process; the last ones may have fewer."""
        return -(-rows // self.size)

    def rows(self, rows: int) -> tuple[int, int]:
        """First row, and how many."""
        per_rank = self.per_rank(rows)
        first = min(self.rank * per_rank, rows)
        return first, min(per_rank, rows - first)


WHOLE = Share()


@dataclass(frozen=True)
class Slot:
    """A parameter that is to be filled.

    Attributes:
        names: Full names of it; several where a head is tied. The files have it under any.
        places: Modules that have it, and its name in each.
    """

    names: tuple[str, ...]
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def module(self) -> nn.Module:
        """The first module that has it."""
        return self.places[0][0]

    @property
    def name(self) -> str:
        """Its name there."""
        return self.places[0][1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the files."""
        if self.is_nf4:
            return self.module.out_features, self.module.in_features  # type: ignore[return-value]
        return tuple(self.module._parameters[self.name].shape)  # type: ignore[union-attr]

    @property
    def is_nf4(self) -> bool:
        """Whether it is the weight of a quantised layer."""
        return isinstance(self.module, Nf4Linear) and self.name == "weight"


@dataclass(frozen=True)
class Filling:
    """How a model is filled.

    Attributes:
        slots: What is to be filled.
        files: What is in the files.
        device: Where it goes.
        dtype: What it is cast to, before any quantisation.
        double: Whether NF4's constants are quantised too.
        share: What of it this process holds.
        gather: Joins the rows of all processes, each the same number of them.
        put: Takes a slot and this process's rows.
        sums: Takes checksums of what this process holds, by the names in the files; None for none.
        on_bytes: Told how many bytes of how many have been used.
        on_tensor: Called after each tensor, by all processes together.
    """

    slots: Sequence[Slot]
    files: Mapping[str, Stored]
    device: torch.device
    dtype: torch.dtype
    double: bool
    share: Share
    gather: Callable[[torch.Tensor], torch.Tensor]
    put: Callable[[Slot, torch.Tensor], None]
    sums: dict[str, torch.Tensor] | None = None
    on_bytes: Callable[[int, int], None] = lambda *_: None
    on_tensor: Callable[[], None] = lambda: None

    def note(self, name: str, data: torch.Tensor, first: int) -> None:
        """Keep the checksum of this process's bytes, the first of them at a place in the tensor."""
        if self.sums is not None:
            self.sums[name] = checksum(data, first)


def fill(filling: Filling) -> None:
    """Read, quantise and put every tensor.

    Raises:
        ModelError: The files are not those of this model.
        QLoRAError: Storage does not answer.
    """
    named = check_names(filling)
    reader = PieceReader(filling.device)
    try:
        reader.read(_all_pieces(filling, named))
    finally:
        reader.close()


def check_names(filling: Filling) -> Mapping[str, Slot]:
    """Compare names, shapes and kinds of what is wanted and of what is there.

    Returns:
        The slots, by the names that the files have.

    Raises:
        ModelError: They differ.
    """
    files, used, lacking, wrong = filling.files, set[str](), [], []
    named: dict[str, Slot] = {}
    for slot in filling.slots:
        there = [name for name in slot.names if name in files]
        if not there:
            lacking.append(slot.names[0])
            continue
        _check_equal([files[name] for name in there], there)
        used.update(there)
        name = there[0]
        named[name], stored = slot, files[name]
        if slot.is_nf4 and f"{name}.absmax" in files:
            _check_double(f"{name}.nested_absmax" in files, filling.double)
            used.update(f"{name}.{part}" for part in _packed_parts(double=filling.double))
            continue
        if not stored.dtype.is_floating_point:
            raise ModelError(
                f"model.source: {name} is stored as {stored.dtype}: the model is quantised "
                "already, in another way than quantization says; use the published 16-bit model"
            )
        if stored.shape != slot.shape:
            wrong.append(f"{name} is {stored.shape}, not {slot.shape}")
    problems = {
        "lacks": lacking,
        "holds, and the model has not,": [
            name for name in files if name not in used and not name.endswith(_COMPUTED)
        ],
        "has other shapes:": wrong,
    }
    if texts := [f"{what} {listed(names)}" for what, names in problems.items() if names]:
        folder = next(iter(files.values())).path.parent if files else "the model"
        raise ModelError(f"model.source: {folder} {'; '.join(texts)}")
    if missing := sorted(used - set(files)):
        raise ModelError(f"model.source: the files lack {listed(missing)}")
    return named


def _check_double(there: bool, wanted: bool) -> None:
    if there != wanted:
        raise ModelError(
            f"model.source: the model was quantised with quantization.double={str(there).lower()}; "
            "take that, or the published 16-bit model"
        )


def _check_equal(copies: Sequence[Stored], names: Sequence[str]) -> None:
    """A tied tensor that is stored twice is the same twice."""
    for copy, name in zip(copies[1:], names[1:], strict=True):
        if _bytes_of(copy) != _bytes_of(copies[0]):
            raise ModelError(
                f"model.source: {names[0]} and {name} differ, and config.json ties them; set "
                "tie_word_embeddings to false in it"
            )


def _bytes_of(stored: Stored) -> memoryview:
    with stored.path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(whole)[stored.start : stored.start + stored.num_bytes]


def _all_pieces(filling: Filling, named: Mapping[str, Slot]) -> Iterator[Piece]:
    total = sum(_num_bytes(filling, name, slot) for name, slot in named.items())
    done = 0
    for name, slot in named.items():
        job = _job(filling, name, slot)
        yield from job.pieces()
        done += _num_bytes(filling, name, slot)
        yield _end(filling, slot, job, done, total)


def _end(filling: Filling, slot: Slot, job: "_Job", done: int, total: int) -> Piece:
    """No bytes, and what is to be done after those before."""

    def use(_: torch.Tensor) -> None:
        filling.put(slot, job.finish())
        filling.on_bytes(done, total)
        filling.on_tensor()

    return Piece(Path(), 0, 0, use)


def _num_bytes(filling: Filling, name: str, slot: Slot) -> int:
    """Bytes of a tensor that this process reads, without its constants."""
    stored = filling.files[name]
    rows = slot.shape[0]
    return stored.num_bytes * filling.share.rows(rows)[1] // rows


class _Job(Protocol):
    """One tensor on its way."""

    def pieces(self) -> Iterator[Piece]:
        """What is to be read, each used in turn."""
        ...

    def finish(self) -> torch.Tensor:
        """This process's rows of it, once all has been used."""
        ...


def _job(filling: Filling, name: str, slot: Slot) -> _Job:
    if not slot.is_nf4:
        return _Plain(filling, name)
    if f"{name}.absmax" in filling.files:
        return _Packed(filling, name, slot.shape)
    return _Quantised(filling, name)


class _Plain:
    """A tensor that is not quantised."""

    def __init__(self, filling: Filling, name: str) -> None:
        self._filling, self._stored = filling, filling.files[name]
        self._name = name
        self._first, self._count = filling.share.rows(self._stored.shape[0])
        shape = (self._count, *self._stored.shape[1:])
        self._rows = torch.empty(shape, dtype=filling.dtype, device=filling.device)

    def pieces(self) -> Iterator[Piece]:
        unit = self._stored.row_bytes
        yield from pieces_of(self._stored, self._first, self._count, unit, self._use)

    def finish(self) -> torch.Tensor:
        data = self._rows.reshape(-1).view(torch.uint8)
        self._filling.note(self._name, data, self._first * self._stored.row_bytes)
        return self._rows

    def _use(self, data: torch.Tensor, row: int, count: int) -> None:
        rows = data.view(self._stored.dtype).view(count, *self._stored.shape[1:])
        self._rows[row : row + count].copy_(rows, non_blocking=True)


class _Quantised:
    """A matrix that is quantised as it is read."""

    def __init__(self, filling: Filling, name: str) -> None:
        self._filling, self._stored = filling, filling.files[name]
        self._first, self._count = filling.share.rows(self._stored.shape[0])
        width, rows = self._stored.shape[1], filling.share.per_rank(self._stored.shape[0])
        # Rows that only fill up the last process's part stay zero.
        empty = partial(torch.zeros, device=filling.device)
        self._packed = empty(rows, width // 2, dtype=torch.uint8)
        self._absmax = empty(rows, width // NF4_BLOCK, dtype=torch.float32)

    def pieces(self) -> Iterator[Piece]:
        unit = self._stored.row_bytes
        yield from pieces_of(self._stored, self._first, self._count, unit, self._use)

    def _use(self, data: torch.Tensor, row: int, count: int) -> None:
        rows = data.view(self._stored.dtype).view(count, -1)
        rows = rows.to(self._filling.device, non_blocking=True).to(self._filling.dtype)
        packed, absmax = quantise_rows(rows)
        self._packed[row : row + count] = packed
        self._absmax[row : row + count] = absmax

    def finish(self) -> torch.Tensor:
        out, width = self._stored.shape
        absmax, nested = self._absmax.view(torch.uint8), None
        if self._filling.double:
            whole, nested = nest(self._filling.gather(self._absmax)[:out])
            absmax = torch.zeros_like(self._absmax, dtype=torch.uint8)
            absmax[: self._count] = whole[self._first : self._first + self._count]
        more = constants((out, width), self._filling.dtype, nested, self._filling.device)
        return Nf4Tensor(self._packed, absmax, more, self._filling.dtype)


class _Packed:
    """A matrix that was quantised before, as transformers and bitsandbytes store it."""

    def __init__(self, filling: Filling, name: str, shape: tuple[int, ...]) -> None:
        self._filling, self._name, self._shape = filling, name, shape
        self._first, self._count = filling.share.rows(shape[0])
        rows, device = filling.share.per_rank(shape[0]), filling.device
        self._packed = torch.zeros(rows, shape[1] // 2, dtype=torch.uint8, device=device)
        size = absmax_bytes(shape[1], double=filling.double)
        self._absmax = torch.zeros(rows, size, dtype=torch.uint8, device=device)
        self._whole: dict[str, torch.Tensor] = {}

    def pieces(self) -> Iterator[Piece]:
        files, name = self._filling.files, self._name
        for stored, rows in ((files[name], self._packed), (files[f"{name}.absmax"], self._absmax)):
            if stored.num_bytes != self._shape[0] * rows.shape[1]:
                raise ModelError(
                    f"model.source: {name} has {stored.num_bytes:,} bytes, not "
                    f"{self._shape[0] * rows.shape[1]:,}: it was quantised otherwise, or is another"
                )
            use = partial(self._use, rows)
            yield from pieces_of(stored, self._first, self._count, rows.shape[1], use)
        for part in _packed_parts(double=self._filling.double)[1:]:
            stored = files[f"{name}.{part}"]
            size = stored.num_bytes
            keep = partial(self._keep, part, stored.dtype)
            yield from pieces_of(stored, 0, 1, size, keep)

    def _use(self, rows: torch.Tensor, data: torch.Tensor, row: int, count: int) -> None:
        rows[row : row + count].copy_(data.view(count, -1), non_blocking=True)

    def _keep(
        self, part: str, dtype: torch.dtype, data: torch.Tensor, row: int, count: int
    ) -> None:
        # A copy: the buffer is used again.
        self._whole[part] = data.clone().view(dtype)

    def finish(self) -> torch.Tensor:
        for name, rows in ((self._name, self._packed), (f"{self._name}.absmax", self._absmax)):
            self._filling.note(name, rows[: self._count], self._first * rows.shape[1])
        if self._filling.share.rank == 0:
            for part, tensor in self._whole.items():
                self._filling.note(f"{self._name}.{part}", tensor.view(torch.uint8), 0)
        said = json.loads(bytes(self._whole[_STATE].numpy()).decode())
        wanted = {
            "quant_type": "nf4",
            "blocksize": NF4_BLOCK,
            "dtype": str(self._filling.dtype).removeprefix("torch."),
            "shape": list(self._shape),
        }
        if self._filling.double:
            wanted["nested_blocksize"] = NESTED_BLOCK
        if odd := [f"{key} {said.get(key)}" for key in wanted if said.get(key) != wanted[key]]:
            raise ModelError(
                f"model.source: {self._name} was quantised otherwise than this run wants: "
                f"{', '.join(odd)}; use the published 16-bit model"
            )
        device, nested = self._filling.device, None
        if self._filling.double:
            nested = Nested(
                absmax=self._whole["nested_absmax"].to(device),
                code=self._whole["nested_quant_map"].to(device),
                offset=torch.tensor(float(said["nested_offset"])).to(device),
            )
        shape = (self._shape[0], self._shape[1])
        more = constants(shape, self._filling.dtype, nested, device)
        return Nf4Tensor(self._packed, self._absmax, more, self._filling.dtype)


def _packed_parts(*, double: bool) -> tuple[str, ...]:
    """What lies beside a packed matrix, after its name."""
    nested = ("nested_absmax", "nested_quant_map") if double else ()
    return ("absmax", "quant_map", *nested, _STATE)
