"""A base kept in NF4 on the disk, so that it is quantised once.

::

    KEY/                            KEY is a fingerprint of the base's content and the quantisation
      model-00001-of-00009.safetensors, model.safetensors.index.json
      config.json, tokenizer.json, ...   transformers loads the folder as it is
      manifest.json                 sizes and hashes of the files, a checksum of each tensor

It is written under another name and renamed when it is whole. A hash of all files would take longer
than loading them; each process sums what it has read instead, on its device, and the sums of all
have to be the manifest's.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_dist import unfinished
from qlora_dist.errors import ModelError
from qlora_dist.files import (
    fsync_dir,
    fsync_file,
    refuse_foreign,
    remove_tree,
    sha256_file,
    write_json,
)
from qlora_dist.sizes import GIB, NESTED_BLOCK, NF4_BLOCK
from qlora_dist.spec import Nf4Quantization, RunSpec
from qlora_dist.train.base_files import INDEX, Stored, find_files
from qlora_dist.train.fill import Slot
from qlora_dist.train.load import COMPANIONS, DTYPES, base_folder, empty_base, fill_base
from qlora_dist.train.nf4 import Nf4Tensor
from qlora_dist.train.quantise import checksum
from qlora_dist.train.tensor_file import Kind, TensorFile

FORMAT = 1
MANIFEST = "manifest.json"
_FILE_BYTES = 4 * GIB
# bitsandbytes' JSON about a matrix has no fixed length; blanks fill it up.
_STATE_BYTES = 512
_STATE = "quant_state.bitsandbytes__nf4"
_COPY_BYTES = 64 << 20
# Pages of each of the base's files that its fingerprint reads.
_PAGES, _PAGE_BYTES = 64, 4096


class DamagedCacheError(ModelError):
    """A cache is not what its manifest says."""


def cache_path(spec: RunSpec) -> Path:
    """Where the spec's quantised base is, or will be.

    Raises:
        ModelError: The base is missing or gated.
    """
    nf4 = spec.quantization
    assert isinstance(nf4, Nf4Quantization)
    assert nf4.cache_dir is not None
    digest = hashlib.sha256(f"{FORMAT} {spec.model.dtype} {nf4.double}".encode())
    folder = base_folder(spec)
    files = find_files(folder)
    for path in sorted({stored.path for stored in files.values()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            # The header, and pages from one end to the other: other weights differ in all of them.
            for page in range(_PAGES):
                file.seek(page * max(0, size - _PAGE_BYTES) // (_PAGES - 1))
                digest.update(file.read(_PAGE_BYTES))
    digest.update((folder / "config.json").read_bytes())
    return Path(nf4.cache_dir) / digest.hexdigest()[:32]


def read_manifest(path: Path) -> Mapping[str, Any]:
    """What a cache says of itself; sizes are compared, not bytes.

    Raises:
        FileNotFoundError: There is none.
        DamagedCacheError: It is damaged.
        OSError: It cannot be read, or belongs to another user.
    """
    try:
        tree: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {name: int(entry["bytes"]) for name, entry in tree["files"].items()}
        assert tree["tensors"]
    except FileNotFoundError:
        if path.is_dir():
            raise DamagedCacheError(f"{path} lacks its {MANIFEST}") from None
        raise
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise DamagedCacheError(f"{path / MANIFEST} cannot be read: {error}") from error
    refuse_foreign(path)
    for name, size in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise DamagedCacheError(f"{file} is missing, truncated or grown")
    return tree


def ensure_cache(
    spec: RunSpec,
    device: torch.device,
    *,
    on_bytes: Callable[[int, int], None] = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """The cache of a spec's base: the one that is there, or a new one.

    Args:
        spec: Names the base, its quantisation and the folder of caches.
        device: Where it is quantised; needs room for the largest matrix alone.
        on_bytes: Told how many bytes of how many of the base are done; what it raises ends the
            work, and leaves nothing behind.
        say: Takes lines for a person.

    Raises:
        ModelError: The base is missing or not what its config says.
        OSError: The cache cannot be written.
    """
    path = cache_path(spec)
    try:
        read_manifest(path)
    except FileNotFoundError:
        pass
    except DamagedCacheError as error:
        say(f"model: {error}; quantising again")
        set_aside(path)
    else:
        return path
    say(f"model: quantising into {path}")
    _write(spec, path, device, on_bytes)
    return path


def copy_to(
    path: Path, root: Path, *, on_bytes: Callable[[int, int], None] = lambda *_: None
) -> Path:
    """A copy of a cache in another folder, on faster storage: the one that is there, or a new one.

    Args:
        path: The cache.
        root: The other folder.
        on_bytes: Told how many bytes of how many are copied; what it raises ends the copy.

    Raises:
        OSError: There is no room, or the storage refused; nothing is left there.
    """
    copy = root / path.name
    try:
        read_manifest(copy)
        if _looks_alike(copy, path):
            return copy
        set_aside(copy)
    except FileNotFoundError:
        pass
    except DamagedCacheError:
        set_aside(copy)
    names = [MANIFEST, *read_manifest(path)["files"]]
    total, done = sum((path / name).stat().st_size for name in names), 0
    with unfinished.writing(copy) as partial:
        if shutil.disk_usage(partial).free < total:
            raise OSError(errno.ENOSPC, f"{total / GIB:.1f} GiB do not fit", str(root))
        for name in names:
            with (path / name).open("rb") as source, (partial / name).open("wb") as target:
                while data := source.read(_COPY_BYTES):
                    target.write(data)
                    done += len(data)
                    on_bytes(done, total)
            # A node that dies must leave no file of the right size that holds nothing.
            fsync_file(partial / name)
        fsync_dir(partial)
    return copy


def _looks_alike(copy: Path, path: Path) -> bool:
    """Whether all that is read before the sums can be compared is the same."""
    try:
        ours, theirs = find_files(copy), find_files(path)
        for name, stored in theirs.items():
            mine = ours[name]
            if (mine.start, mine.num_bytes) != (stored.start, stored.num_bytes):
                return False
            if stored.num_bytes <= _STATE_BYTES and _data(mine) != _data(stored):
                return False
        small = [name for name in read_manifest(path)["files"] if name.endswith(".json")]
        return all((copy / name).read_bytes() == (path / name).read_bytes() for name in small)
    except (ModelError, KeyError):
        return False


def _data(stored: Stored) -> bytes:
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        return file.read(stored.num_bytes)


def set_aside(path: Path) -> None:
    """Remove a damaged cache; who has it open keeps it, and nobody opens it any more."""
    aside = path.with_name(f"{path.name}.damaged-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        remove_tree(aside)


def damaged_file(path: Path, *, on_chunk: Callable[[], None] = lambda: None) -> Path | None:
    """The first file of a cache whose bytes are not those that were written; all are read.

    Args:
        path: The cache.
        on_chunk: Called between pieces; what it raises ends the search.
    """
    for name, entry in read_manifest(path)["files"].items():
        written = entry["sha256"]
        if written is not None and sha256_file(path / name, on_chunk=on_chunk) != written:
            return path / name
    return None


def wrong_sum(path: Path, sums: Mapping[str, int]) -> str:
    """Compare sums of whole tensors with what was written; which differs, and nothing if none."""
    wanted: dict[str, int] = read_manifest(path)["tensors"]
    bad = sorted(name for name in wanted if sums.get(name) != wanted[name])
    return f"{path}: the bytes of {bad[0]} changed after it was written" if bad else ""


def _write(
    spec: RunSpec, path: Path, device: torch.device, on_bytes: Callable[[int, int], None]
) -> None:
    with unfinished.writing(path) as partial:
        _check_room(spec, partial)
        _write_files(spec, partial, device, on_bytes)


def _check_room(spec: RunSpec, partial: Path) -> None:
    """Refuse where the disk is plainly too small: a 16-bit base becomes at most a half of it."""
    files = find_files(base_folder(spec))
    elements = sum(stored.num_bytes // stored.dtype.itemsize for stored in files.values())
    need, free = elements // 2, shutil.disk_usage(partial).free
    if need > free:
        raise ModelError(
            f"quantization.cache_dir: {partial.parent} has {free / GIB:.1f} GiB free, and the base "
            f"takes at least {need / GIB:.1f} GiB"
        )


@dataclass
class _Files:
    """The files of a cache, tensor by tensor.

    Attributes:
        folder: Where they are.
        layout: Kinds of the tensors of each file.
        tensors: Checksums of those that are written.
        hashes: SHA-256 of the files that are whole.
    """

    folder: Path
    layout: dict[str, dict[str, Kind]]
    tensors: dict[str, int]
    hashes: dict[str, str]
    _open: TensorFile | None = None
    _left: int = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor."""
        file = next(file for file, kinds in self.layout.items() if name in kinds)
        if self._open is None:
            kinds = self.layout[file]
            self._open = TensorFile(self.folder / file, kinds, metadata={"format": "pt"})
            self._left = len(kinds)
        self._open.add(name, tensor)
        data = tensor.reshape(-1).view(torch.uint8)
        self.tensors[name] = int(checksum(data, 0).item())
        self._left -= 1
        if not self._left:
            self._open.__exit__(None)
            self.hashes[file], self._open = self._open.sha256, None


def _write_files(
    spec: RunSpec, folder: Path, device: torch.device, on_bytes: Callable[[int, int], None]
) -> None:
    base = empty_base(spec, attention="sdpa")
    kinds = {name: kind for slot in base.slots for name, kind in _kinds(spec, slot).items()}
    files = _Files(folder, _layout(kinds), {}, {})

    def put(slot: Slot, rows: torch.Tensor) -> None:
        tensors = _parts(rows) if isinstance(rows, Nf4Tensor) else {"": rows}
        for part, tensor in tensors.items():
            files.add(f"{slot.names[0]}{part}", tensor)

    fill_base(base, spec, device=device, put=put, on_bytes=on_bytes)
    names = {name: file for file, own in files.layout.items() for name in own}
    size = sum((folder / file).stat().st_size for file in files.layout)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": names})
    _write_companions(spec, folder)
    listed = {}
    for file in sorted({*folder.glob("*")} - {folder / unfinished.OWNER}):
        fsync_file(file)
        listed[file.name] = {"bytes": file.stat().st_size, "sha256": files.hashes.get(file.name)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": listed, "tensors": files.tensors})
    fsync_dir(folder)


def _kinds(spec: RunSpec, slot: Slot) -> dict[str, Kind]:
    """Tensors that a parameter becomes."""
    name = slot.names[0]
    if not slot.is_nf4:
        return {name: Kind(DTYPES[spec.model.dtype], slot.shape)}
    assert isinstance(spec.quantization, Nf4Quantization)
    count = slot.shape[0] * slot.shape[1]
    blocks = count // NF4_BLOCK
    kinds = {
        "": Kind(torch.uint8, (count // 2, 1)),
        ".absmax": Kind(torch.uint8 if spec.quantization.double else torch.float32, (blocks,)),
        ".quant_map": Kind(torch.float32, (16,)),
        f".{_STATE}": Kind(torch.uint8, (_STATE_BYTES,)),
    }
    if spec.quantization.double:
        nested = -(-blocks // NESTED_BLOCK)
        kinds[".nested_absmax"] = Kind(torch.float32, (nested,))
        kinds[".nested_quant_map"] = Kind(torch.float32, (256,))
    return {f"{name}{part}": kind for part, kind in kinds.items()}


def _parts(weight: Nf4Tensor) -> dict[str, torch.Tensor]:
    """The same tensors, in bitsandbytes' own words and in the order of :func:`_kinds`."""
    found = weight.state().as_dict(packed=True)
    said = found[_STATE].cpu()
    blank = torch.full((_STATE_BYTES - len(said),), ord(" "), dtype=torch.uint8)
    found[_STATE] = torch.cat([said, blank])
    order = ("absmax", "quant_map", _STATE, "nested_absmax", "nested_quant_map")
    return {"": weight.flat()} | {f".{part}": found[part] for part in order if part in found}


def _layout(kinds: Mapping[str, Kind]) -> dict[str, dict[str, Kind]]:
    """Tensors shared out over files of a bearable size, in their order."""
    groups: list[dict[str, Kind]] = []
    size = _FILE_BYTES
    for name, kind in kinds.items():
        count = kind.dtype.itemsize
        for length in kind.shape:
            count *= length
        if size + count > _FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = kind
        size += count
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return dict(zip(names, groups, strict=True))


def _write_companions(spec: RunSpec, folder: Path) -> None:
    """Whatever else the base's folder has that is read, and config.json with the quantisation."""
    from transformers import BitsAndBytesConfig

    assert isinstance(spec.quantization, Nf4Quantization)
    source = base_folder(spec)
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    dtype = DTYPES[spec.model.dtype]
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=spec.quantization.double,
        bnb_4bit_compute_dtype=dtype,
    ).to_dict()
    write_json(folder / "config.json", config)
