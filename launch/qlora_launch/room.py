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
    run = f"checkpoints of {sizes['one checkpoint'] / GIB:.1f} GiB each (checkpoint.keep_last)"
    wanted = [
        (
            run_dir_of(plan.spec),
            sizes["checkpoints"] + sizes.get("adapter", sizes.get("model", 0)),
            run,
        )
    ]
    nf4 = plan.spec.quantization
    if isinstance(nf4, Nf4Quantization) and nf4.cache_dir is not None:
        wanted.append((Path(nf4.cache_dir), sizes["NF4 cache"], "quantization.cache_dir"))
    disks: defaultdict[int, list[tuple[Path, int, str]]] = defaultdict(list)
    for folder, size, what in wanted:
        with contextlib.suppress(OSError, RuntimeError):
            path = folder.expanduser().absolute()
            # A folder of caches that holds something may hold this base.
            if what == "quantization.cache_dir" and path.is_dir() and any(path.iterdir()):
                continue
            existing = next(parent for parent in (path, *path.parents) if parent.exists())
            disks[existing.stat().st_dev].append((existing, size, what))
    return [line for found in disks.values() if (line := _shortage(found))]


def _shortage(found: list[tuple[Path, int, str]]) -> str:
    place, needed = found[0][0], sum(size for _, size, _ in found)
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return ""
    if free >= needed:
        return ""
    return (
        f"disk: {place} has {free / GIB:.1f} GiB free, and the run writes up to "
        f"{needed / GIB:.1f} GiB there: {' and '.join(what for _, _, what in found)}"
    )
