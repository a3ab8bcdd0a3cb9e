"""Whether the disks have room for what a run writes."""

import contextlib
import shutil
from collections import defaultdict
from pathlib import Path

from qlora_dist.layout import run_dir_of
from qlora_dist.plan import Plan
from qlora_dist.sizes import GIB
from qlora_dist.spec import Nf4Quantization


def shortages(plan: Plan) -> list[str]:
    """Disks without the room that the run needs, in words; those that cannot be asked are left out.

    Folders on one disk are counted together.
    """
    sizes = {line.name: line.bytes for line in plan.footprint.disk}
    folders = [(run_dir_of(plan.spec), sizes["checkpoints"] + sizes["adapter"])]
    nf4 = plan.spec.quantization
    if isinstance(nf4, Nf4Quantization) and nf4.cache_dir is not None:
        cache = Path(nf4.cache_dir).expanduser().absolute()
        with contextlib.suppress(OSError):
            # One that holds something may hold this base.
            if not (cache.is_dir() and any(cache.iterdir())):
                folders.append((cache, sizes["NF4 cache"]))
    disks: defaultdict[int, list[tuple[Path, int]]] = defaultdict(list)
    for folder, size in folders:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with contextlib.suppress(OSError):
            disks[existing.stat().st_dev].append((existing, size))
    return [line for found in disks.values() if (line := _shortage(plan, found))]


def _shortage(plan: Plan, found: list[tuple[Path, int]]) -> str:
    place, needed = found[0][0], sum(size for _, size in found)
    free = shutil.disk_usage(place).free
    if free >= needed:
        return ""
    return (
        f"disk: {place} has {free / GIB:.1f} GiB free, and the run writes up to "
        f"{needed / GIB:.1f} GiB there, {_one(plan) / GIB:.1f} GiB a checkpoint; keep fewer "
        "(checkpoint.keep_last), or choose another run_dir"
    )


def _one(plan: Plan) -> int:
    return next(line.bytes for line in plan.footprint.disk if line.name == "one checkpoint")
