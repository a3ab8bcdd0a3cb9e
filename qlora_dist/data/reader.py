"""Rows of a local file or of a hub dataset, through Hugging Face ``datasets``."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_dist.errors import DataError
from qlora_dist.hub import explain, looks_like_path, read_token
from qlora_dist.spec import RunSpec

# Suffix -> builder of ``datasets``.
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
SUFFIXES = tuple(_BUILDERS)


def read_rows(spec: RunSpec) -> Iterator[dict[str, object]]:
    """Rows in the order of the source.

    Raises:
        DataError: The file or dataset is missing, empty, or malformed.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    data = spec.data
    path = Path(data.source).expanduser()
    try:
        if path.is_file():
            rows = _load_file(datasets, path)
        elif path.exists() or looks_like_path(data.source) or path.suffix in _BUILDERS:
            raise DataError(
                f"data.source: there is no file {data.source!r}"
                + (f" (looked in {Path.cwd()})" if not path.is_absolute() else "")
            )
        else:
            rows = datasets.load_dataset(
                data.source,
                data.subset,
                split=data.split,
                revision=data.revision,
                token=read_token(spec.model.token_file),
            )
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"data.source: {data.source!r} cannot be read: {cause}") from error
    except (OSError, ValueError) as error:
        # What ``datasets`` says of a table that has a header and nothing else.
        if "corresponds to no data" in str(error):
            raise DataError(f"data.source: {data.source!r} holds no rows") from error
        message = explain(error, kind="dataset", key="data.source", source=data.source)
        raise DataError(message) from error
    if len(rows) == 0:
        raise DataError(f"data.source: {data.source!r} holds no rows")
    return iter(rows)


def _load_file(datasets: Any, path: Path) -> Any:
    if path.suffix not in _BUILDERS:
        raise DataError(f"data.source: {path} is of no known kind; known: {', '.join(_BUILDERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"data.source: {path} is empty")
    builder = _BUILDERS[path.suffix]
    options = _table_options(datasets, path) if builder == "csv" else {}
    return datasets.load_dataset(builder, data_files=str(path), split="train", **options)


def _table_options(datasets: Any, path: Path) -> dict[str, Any]:
    """Options that leave every field the text that it is.

    pandas, which reads the table, would make numbers of digits and nothing of "NA" or "null", all
    of which people answer.
    """
    delimiter = "\t" if path.suffix == ".tsv" else ","
    # utf-8-sig: spreadsheets write a byte order mark, which would be part of the first name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=delimiter), [])
    return {
        "delimiter": delimiter,
        "encoding": "utf-8-sig",
        "keep_default_na": False,
        "features": datasets.Features({name: datasets.Value("string") for name in names}),
    }
