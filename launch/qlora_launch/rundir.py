"""Writing a bundle to its run directory."""

import errno
import shutil
from pathlib import Path

from qlora_dist.attempt import idle
from qlora_dist.data.reader import local_file
from qlora_dist.errors import ModelError, PlanError, QLoRAError, RunDirError
from qlora_dist.files import fsync_dir, write_text
from qlora_dist.hub import looks_like_path
from qlora_dist.layout import CONTAINER, RunDir, open_run
from qlora_dist.resume import check_change
from qlora_dist.spec import Nf4Quantization, RunSpec
from qlora_launch.code_snapshot import current_code, write_code
from qlora_launch.render import Bundle


def absolute_paths(spec: RunSpec) -> RunSpec:
    """The spec with every path that exists here made absolute.

    Processes of the run may start in another folder, or on another machine.
    """
    model = spec.model.model_copy(update={"source": _absolute(spec.model.source)})
    if model.token_file is not None:
        model = model.model_copy(
            update={"token_file": str(Path(model.token_file).expanduser().absolute())}
        )
    data = spec.data
    if data.mix is not None:
        mix = [d.model_copy(update={"source": _absolute(d.source)}) for d in data.mix]
        data = data.model_copy(update={"mix": mix})
    elif data.source is not None:
        data = data.model_copy(update={"source": _absolute(data.source)})
    if data.store_dir is not None:
        store_dir = str(Path(data.store_dir).expanduser().absolute())
        data = data.model_copy(update={"store_dir": store_dir})
    quantization = spec.quantization
    if isinstance(quantization, Nf4Quantization) and quantization.cache_dir is not None:
        cache_dir = str(Path(quantization.cache_dir).expanduser().absolute())
        quantization = quantization.model_copy(update={"cache_dir": cache_dir})
    changes = {"model": model, "data": data, "quantization": quantization}
    return spec.model_copy(update=changes)


def write_run_dir(bundle: Bundle, spec: RunSpec) -> RunDir:
    """Create the run directory, or give one that is there the spec's new settings.

    A run that never trained (a first start that failed, whose config has been mended) is replaced.
    One that has goes on with what may change (:mod:`qlora_dist.resume`).

    Raises:
        RunDirError: The folder holds another run, one that a launcher has, or no run at all.
        QLoRAError: It cannot be written; nothing of it is left.
    """
    run = RunDir(bundle.run_dir)
    if run.run_json.exists():
        _, there = open_run(run.root)
        if _same(there, spec):
            return run
        if _has_anything(run):
            _check_change(run, there, spec)
            change_run_dir(run, bundle)
            return run
    elif run.root.exists() and not (run.root.is_dir() and not any(run.root.iterdir())):
        raise RunDirError(
            f"{run.root} is there and holds no run; choose another with run_dir=..., or remove it"
        )
    new = run.root.with_name(f".{run.root.name}.partial")
    try:
        if new.exists():
            shutil.rmtree(new)
        new.mkdir(mode=0o700, parents=True)
        (new / "control").mkdir(mode=0o700)
        (new / "attempts").mkdir(mode=0o700)
        for name, text in bundle.files.items():
            write_text(new / name, text)
        write_code(current_code(), new)
        if run.root.exists():
            shutil.rmtree(run.root)
        new.rename(run.root)
        fsync_dir(run.root.parent)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise QLoRAError(f"cannot create {run.root}: {reason}") from error
    return run


def change_run_dir(run: RunDir, bundle: Bundle) -> None:
    """Give a run new files, while no launcher has it.

    Raises:
        RunDirError: A launcher has it.
    """
    with idle(run):
        # run.json last: until it is there, the same command is needed again, and does all of this.
        for name in sorted(bundle.files, key=lambda name: name == "run.json"):
            write_text(run.root / name, bundle.files[name])
        if CONTAINER not in bundle.files:
            (run.root / CONTAINER).unlink(missing_ok=True)


def _has_anything(run: RunDir) -> bool:
    """Whether a run directory holds more than its launcher writes before the first start."""
    kept = (run.owner_json, run.metrics, run.adapter, run.model, run.merged)
    there = run.checkpoints.is_dir() and any(run.checkpoints.iterdir())
    return there or any(path.exists() for path in kept)


def _check_change(run: RunDir, there: RunSpec, spec: RunSpec) -> None:
    try:
        check_change(there, spec)
    except PlanError as error:
        raise RunDirError(
            f"{run.root} belongs to another spec; {error}\n"
            f"Continue that run with: qlora resume {run.root}\n"
            "or give this one a folder of its own with name=... or run_dir=..."
        ) from None


def _same(left: RunSpec, right: RunSpec) -> bool:
    return left.model_copy(update={"run_dir": None}) == right.model_copy(update={"run_dir": None})


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def check_local_paths(spec: RunSpec) -> None:
    """Refuse a model or data file that is plainly not there, before anything is written.

    Raises:
        ModelError: ``model.source`` is written as a path, and there is no such folder.
        DataError: ``data.source`` is written as a path, and there is no such file.
    """
    if looks_like_path(spec.model.source) and not Path(spec.model.source).expanduser().is_dir():
        raise ModelError(f"model.source: there is no folder {spec.model.source!r}")
    for dataset in spec.data.datasets:
        local_file(dataset)
