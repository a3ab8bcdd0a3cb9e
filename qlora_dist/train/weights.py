"""The base's weights onto all processes of a run, from its files or from a cache in NF4."""

import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from qlora_dist import faults
from qlora_dist.errors import QLoRAError
from qlora_dist.files import SEEN_WITHIN_S, wait_for
from qlora_dist.sizes import GIB
from qlora_dist.spec import Nf4Quantization, RunSpec
from qlora_dist.train import nf4_cache
from qlora_dist.train.load import EmptyBase, fill_base
from qlora_dist.train.log import EverySoOften, RunLog
from qlora_dist.train.preempt import Preempted, StopRequest
from qlora_dist.train.strategy import Strategy
from qlora_dist.train.world import World


def load_weights(
    base: EmptyBase,
    spec: RunSpec,
    world: World,
    strategy: Strategy,
    stop: StopRequest,
    check_stop: Callable[[], None],
    log: RunLog,
    local_dir: str = "",
) -> None:
    """Give the base its weights, all processes in step; from a cache, where the spec wants one.

    Args:
        base: Empty.
        spec: Names the model, and the cache.
        world: The processes.
        strategy: Which rows are this process's.
        stop: Whether this process has been asked to stop.
        check_stop: Raises on all processes if any was.
        log: For a person.
        local_dir: Where each machine keeps a copy of the cache, on storage of its own.

    Raises:
        DamagedCacheError: A cache is damaged, and so is the one that was made instead.
    """
    progress = EverySoOften(log.say)

    def on_bytes(done: int, total: int) -> None:
        world.pulse.at("loading the model")
        faults.reach("loading")
        progress.say(f"model: {done / GIB:.1f} of {total / GIB:.1f} GiB read")

    def read(folder: Path | None, sums: dict[str, torch.Tensor] | None) -> None:
        fill_base(
            base,
            spec,
            device=world.device,
            folder=folder,
            share=strategy.share,
            gather=strategy.holders.gather_rows,
            put=strategy.put,
            sums=sums,
            on_bytes=on_bytes,
            on_tensor=check_stop,
        )

    if not isinstance(spec.quantization, Nf4Quantization) or spec.quantization.cache_dir is None:
        read(None, None)
        return

    def check(folder: Path) -> str:
        """Read a cache; what is wrong with its bytes, the same text on all processes."""
        sums: dict[str, torch.Tensor] = {}
        read(folder, sums)
        own = nf4_cache.wrong_sum(folder, _total(sums, folder, strategy.holders))
        return world.first_text(own)

    local_dir = _usable(local_dir, log)
    if world.any(bool(local_dir)):
        folder = _open_cache(spec, world, stop, log, name="quantising the base")
        copy = _near(folder, local_dir, world, stop, check_stop, log)
        if _read_copy(copy, folder, check, world, stop, check_stop, log):
            return
    for attempt in range(2):
        folder = _open_cache(spec, world, stop, log, name=f"quantising the base {attempt}")
        problem = check(folder)
        if not problem:
            return
        if world.rank == 0:
            nf4_cache.set_aside(folder)
        log.say(f"model: {problem}; quantising again")
    raise nf4_cache.DamagedCacheError(problem)


def _usable(local_dir: str, log: RunLog) -> str:
    """A folder for copies; empty, and said, if variables in its name are not known here."""
    if not local_dir or ("$" not in local_dir and Path(local_dir).is_absolute()):
        return local_dir
    log.say(
        f"model: no copy on the nodes: local_dir is {local_dir!r} to this process, which has "
        "SLURM_*, TMPDIR and resources.pass_env of the environment"
    )
    return ""


def _read_copy(
    copy: Path,
    folder: Path,
    check: Callable[[Path], str],
    world: World,
    stop: StopRequest,
    check_stop: Callable[[], None],
    log: RunLog,
) -> bool:
    """Read this node's copy of a cache; whether the bytes of all nodes' are right."""
    try:
        problem = check(copy)
    except QLoRAError as error:
        if copy == folder:
            raise
        nf4_cache.set_aside(copy)
        raise QLoRAError(f"{error}; this node's copy of the base is removed") from error
    if not problem:
        return True

    def work(check: Callable[[], None]) -> str:
        # The sums are of all nodes' parts together: each looks at the whole of its own.
        try:
            damaged = None if copy == folder else nf4_cache.damaged_file(copy, on_chunk=check)
        except Preempted:
            return ""
        if damaged is None:
            return ""
        nf4_cache.set_aside(copy)
        return f"{damaged} changed after it was written, on {socket.gethostname()}: removed"

    log.say(f"model: {problem}; reading {folder}")
    found = world.first_text(world.on_each_node("looking for the damaged copy", work, stop.here))
    check_stop()
    log.say(f"model: {found or 'no copy is damaged where it lies'}")
    return False


def _open_cache(spec: RunSpec, world: World, stop: StopRequest, log: RunLog, *, name: str) -> Path:
    """The quantised base: made by rank 0 if it is not there."""

    def work(check: Callable[[], None]) -> str:
        progress = EverySoOften(log.say)

        def on_bytes(done: int, total: int) -> None:
            check()
            faults.reach("quantising")
            progress.say(f"model: {done / GIB:.1f} of {total / GIB:.1f} GiB quantised")

        check()
        try:
            path = nf4_cache.ensure_cache(spec, world.device, on_bytes=on_bytes, say=log.say)
        except OSError as error:
            raise QLoRAError(f"quantization.cache_dir: {error}") from error
        return str(path)

    path = Path(world.on_rank_0(name, work, stop.here))
    wait_for(path, SEEN_WITHIN_S)
    return path


def _near(
    folder: Path,
    local_dir: str,
    world: World,
    stop: StopRequest,
    check_stop: Callable[[], None],
    log: RunLog,
) -> Path:
    """This machine's own copy of a cache; the cache itself where there is no room for one."""

    def work(check: Callable[[], None]) -> str:
        progress = EverySoOften(log.say)

        def on_bytes(done: int, total: int) -> None:
            check()
            progress.say(f"model: {done / GIB:.1f} of {total / GIB:.1f} GiB copied to {local_dir}")

        if not local_dir:
            return str(folder)
        try:
            return str(nf4_cache.copy_to(folder, Path(local_dir), on_bytes=on_bytes))
        except Preempted:
            # The other machines may not know yet.
            return str(folder)
        except OSError as error:
            log.say(f"model: no copy on this node, reading {folder}: {error}")
            return str(folder)

    path = Path(world.on_each_node("copying the base to the nodes", work, stop.here))
    check_stop()
    return path


def _total(sums: Mapping[str, torch.Tensor], folder: Path, holders: World) -> dict[str, int]:
    """Checksums of whole tensors, of which each process has read its rows."""
    names = list(nf4_cache.read_manifest(folder)["tensors"])
    values = [int(sums[name].item()) if name in sums else 0 for name in names]
    return dict(zip(names, holders.sum_ints(values), strict=True))
