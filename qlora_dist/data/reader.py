"""Rows of a local file or of a hub dataset, through Hugging Face ``datasets``."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

from qlora_dist.errors import DataError
from qlora_dist.files import sha256_file
from qlora_dist.hub import explain, is_commit, looks_like_path, read_token
from qlora_dist.spec import DatasetSection

# Suffix -> builder of ``datasets``.
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}


def read_rows(dataset: DatasetSection, token_file: str | None) -> Any:
    """Rows in the order of the source, as a ``datasets.Dataset``: memory-mapped, not in memory.

    Raises:
        DataError: The file or dataset is missing, empty, or malformed.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    # Offline it warns that what it found is the newest it has; in rows_cache that is the commit.
    datasets.logging.set_verbosity_error()
    source = dataset.source
    try:
        path = local_file(dataset)
        if path is not None:
            rows = _load_file(datasets, path)
        else:
            rows = datasets.load_dataset(
                source,
                dataset.subset,
                split=dataset.split,
                revision=dataset.revision,
                token=read_token(token_file),
                cache_dir=rows_cache(dataset),
            )
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"data.source: {source!r} cannot be read: {cause}") from error
    # RuntimeError: a dataset that is a script.
    except (OSError, ValueError, RuntimeError) as error:
        # What ``datasets`` says of a table that has a header and nothing else.
        if "corresponds to no data" in str(error):
            raise DataError(f"data.source: {source!r} holds no rows") from error
        message = explain(error, kind="dataset", key="data.source", source=source)
        raise DataError(message) from error
    if len(rows) == 0:
        raise DataError(f"data.source: {source!r} holds no rows")
    return rows


def rows_cache(dataset: DatasetSection) -> Path | None:
    """Folder of the rows of a hub dataset at a commit; None, which is the library's, for others.

    Each commit and subset has one of its own: without a network ``datasets`` takes what it has
    prepared last of a dataset, whichever commit the caller names.
    """
    if not is_commit(dataset.revision):
        return None
    from datasets import config

    key = json.dumps([dataset.source, dataset.subset, dataset.revision])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(config.HF_DATASETS_CACHE) / "qlora-dist" / name


def has_rows(dataset: DatasetSection) -> bool:
    """Whether the rows of a hub dataset at a commit are here, so that no network is needed."""
    folder = rows_cache(dataset)
    # Below it: dataset, configuration, version, commit. Unfinished ones have another last name.
    pattern = f"*/*/*/{dataset.revision}/dataset_info.json"
    return folder is not None and any(folder.glob(pattern))


def local_file(dataset: DatasetSection) -> Path | None:
    """The dataset's file; None for one on the hub.

    Raises:
        DataError: It is written as a file, and there is none.
    """
    path = Path(dataset.source).expanduser()
    if path.is_file():
        return path
    if path.exists() or looks_like_path(dataset.source) or path.suffix in _BUILDERS:
        raise DataError(
            f"data.source: there is no file {dataset.source!r}"
            + (f" (looked in {Path.cwd()})" if not path.is_absolute() else "")
        )
    return None


def content_id(dataset: DatasetSection, token_file: str | None) -> str:
    """What tells one state of a dataset from another: a file's hash, or a hub dataset's commit.

    Raises:
        DataError: As :func:`read_rows`.
    """
    path = local_file(dataset)
    if path is not None:
        return _file_sha256(path)
    # ``datasets`` names the folder of its cache after the commit; a split may be part of a file.
    files = read_rows(dataset, token_file).cache_files
    names = ["/".join(Path(file["filename"]).parts[-4:]) for file in files]
    return f"{dataset.source} {dataset.subset} {dataset.split} {dataset.revision} {names}"


def _file_sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"data.source: {path} cannot be read: {error.strerror}") from error


def _load_file(datasets: Any, path: Path) -> Any:
    if path.suffix not in _BUILDERS:
        raise DataError(f"data.source: {path} is of no known kind; known: {', '.join(_BUILDERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"data.source: {path} is empty")
    builder = _BUILDERS[path.suffix]
    try:
        options = _table_options(datasets, path) if builder == "csv" else {}
    except csv.Error as error:
        raise DataError(f"data.source: {path} cannot be read: {error}") from error
    # Named after the content: by itself ``datasets`` would take a new file with an old time for the
    # one in its cache.
    name = _file_sha256(path)[:32]
    return datasets.load_dataset(builder, name, data_files=str(path), split="train", **options)


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
