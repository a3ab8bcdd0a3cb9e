"""``RUN/merged``: which base the adapter is merged into, and the commit of the folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from qlora_dist import checkpoints
from qlora_dist.errors import CheckpointError, DataError, ModelError, RunDirError, UserError
from qlora_dist.files import remove_tree, replace_dir, write_json
from qlora_dist.layout import RunDir
from qlora_dist.spec import LoraAdapter, Nf4Quantization, RunSpec
from qlora_dist.train.measure import (
    Figures,
    Rows,
    Trained,
    choose_rows,
    measure_merged,
    measure_trained,
)
from qlora_dist.train.merge import BaseKind, Sources, open_sources, write_merged
from qlora_dist.train.ticker import Ticker

# In every folder that was made here: none but those is ever replaced, and its spec tells generate
# which template the answers were learned after.
MARK = "export.json"
_UNMEASURED = "to export without measuring: --base 16bit --no-check"


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        kind: Base that the adapter was merged into.
        num_matrices: Matrices that it was merged into.
    """

    kind: BaseKind
    num_matrices: int


def export(
    run: RunDir,
    spec: RunSpec,
    output: Path,
    ticker: Ticker,
    *,
    base: BaseKind | Literal["auto"] = "auto",
    check: bool = True,
) -> Export:
    """Write base + adapter as a Hugging Face model folder; see :func:`write_merged`.

    Args:
        run: The run directory.
        spec: Its spec.
        output: The folder; replaced if it is an earlier export.
        ticker: Shows the stages, and takes the figures.
        base: What the adapter is added to; "auto" measures both and keeps the one that is nearer to
            the trained model. Both are on the disk until then.
        check: Load what was written, and measure it. Must be true for "auto".

    Raises:
        UserError: There is no such base, or nothing to choose by.
        RunDirError: The run has no adapter yet, or ``output`` holds something that is no export.
        ModelError: The base is missing, or lacks a matrix that the adapter is for; or the merged
            model does not load.
        CheckpointError: The folder cannot be written.

    Whatever is raised, ``output`` is as it was and nothing is left beside it.
    """
    if not isinstance(spec.adapter, LoraAdapter):
        raise UserError(
            f"{run.root} has no adapter to merge: its own weights were trained, and {run.model} is "
            "the model"
        )
    kinds = _kinds(spec, base, ticker, check=check)
    _refuse_to_overwrite(output)
    sources = open_sources(run, spec, kinds=kinds)
    partial = output.with_name(output.name + ".partial")
    try:
        with _storage(output):
            remove_tree(partial)
        measured: dict[str, Any] | None = None
        kind = kinds[0]
        if check:
            rows, trained = _measure_trained(run, spec, ticker)
            figures = {
                kind: _candidate(sources, kind, partial / kind, rows, trained, ticker)
                for kind in kinds
            }
            kind = min(kinds, key=lambda kind: figures[kind].kl_nats)
            if len(kinds) > 1:
                ticker.say(f"{kind} is nearer to the trained model")
            measured = {
                "samples": rows.source,
                "num_targets": rows.num_targets,
                "trained": {"perplexity": trained.perplexity},
                **{name: asdict(value) for name, value in figures.items()},
            }
        else:
            _write(sources, kind, partial / kind, ticker)
        with _storage(output):
            mark = {
                "run": spec.name,
                "spec": spec.model_dump(mode="json"),
                "base": kind,
                "base_asked_for": base,
                "measured": measured,
            }
            write_json(partial / kind / MARK, mark)
            replace_dir(partial / kind, output)
    finally:
        checkpoints.discard(partial)
    return Export(kind, len(sources.adapter.names))


def _kinds(
    spec: RunSpec, base: BaseKind | Literal["auto"], ticker: Ticker, *, check: bool
) -> tuple[BaseKind, ...]:
    """What is to be written, in this order."""
    quantised = isinstance(spec.quantization, Nf4Quantization)
    if base == "dequantized" and not quantised:
        raise UserError(
            "--base dequantized: quantization.kind is 'none', so that training quantised nothing; "
            "use --base 16bit"
        )
    if base != "auto":
        return (base,)
    if not check:
        raise UserError(
            "--no-check: --base auto chooses by what it measures; use --base 16bit or --base "
            "dequantized"
        )
    if not quantised:
        ticker.say("quantization.kind is 'none', so that there is only the 16bit base")
        return ("16bit",)
    return ("16bit", "dequantized")


def _refuse_to_overwrite(output: Path) -> None:
    """Only an earlier export, or an empty folder, gives way to a new one."""
    if output.is_dir() and (not any(output.iterdir()) or (output / MARK).is_file()):
        return
    if output.exists():
        raise RunDirError(
            f"{output} is there and was not made by qlora export; choose another --output"
        )


def _measure_trained(run: RunDir, spec: RunSpec, ticker: Ticker) -> tuple[Rows, Trained]:
    try:
        rows = choose_rows(run, spec)
    except DataError as error:
        raise DataError(f"{error}; {_UNMEASURED}") from error
    with _device_memory():
        trained = measure_trained(run, spec, rows, ticker)
    ticker.say(
        f"trained: perplexity {trained.perplexity:.4f} on {rows.num_targets:,} target tokens of "
        f"{rows.source}"
    )
    return rows, trained


def _candidate(
    sources: Sources, kind: BaseKind, folder: Path, rows: Rows, trained: Trained, ticker: Ticker
) -> Figures:
    _write(sources, kind, folder, ticker)
    with _device_memory():
        figures = measure_merged(folder, sources.spec, rows, trained, ticker, name=kind)
    ticker.say(
        f"{kind}: KL {figures.kl_nats:.3e} nats a token from the trained model, perplexity "
        f"{figures.perplexity:.4f}"
    )
    return figures


def _write(sources: Sources, kind: BaseKind, folder: Path, ticker: Ticker) -> None:
    with ticker.stage(f"writing {kind}", sources.num_tensors, "tensor") as tick, _storage(folder):
        write_merged(sources, kind, folder, on_tensor=tick)


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(checkpoints.storage_message(error, path)) from error


@contextmanager
def _device_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"a model does not fit on the GPU: {error}; {_UNMEASURED}") from error
