"""Tokenising a run's datasets into a store, once, for every process and every run that needs it."""

import hashlib
import json
import os
import sys
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_dist.data import example, formats, notes, packing, reader, tokens
from qlora_dist.data.corpus import Corpus
from qlora_dist.data.example import Dropped, Example, MissingField
from qlora_dist.data.formats import learn_of, load_format, template_of
from qlora_dist.data.reader import content_id, read_rows
from qlora_dist.data.store import (
    FORMAT,
    DamagedStoreError,
    Store,
    StoreWriter,
    open_store,
)
from qlora_dist.data.tokenizer import load_tokenizer, tokenizer_sha256
from qlora_dist.data.tokens import Sample, tokenize
from qlora_dist.errors import DataError
from qlora_dist.files import remove_tree
from qlora_dist.layout import RunDir, corpora_dir
from qlora_dist.spec import DatasetSection, RunSpec

# Examples that are tokenised together: enough to keep every core busy.
_BATCH = 1000
_SHOWN_BAD_ROWS = 3
_NO_ROOM = "the prompt leaves no room for an answer within the limit"


def ensure_store(
    spec: RunSpec,
    tokenizer: Any,
    folder: Path,
    *,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    on_chunk: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> Store:
    """The store of a spec's data: the one that is there, every byte checked, or a new one.

    Args:
        spec: Names the datasets and the limits.
        tokenizer: The model's.
        folder: Where stores are.
        on_rows: Told, between batches, how many of how many rows are done; what it raises ends the
            work, and leaves nothing behind.
        on_chunk: Called between pieces of a store that is checked; the same.
        say: Takes lines for a person.

    Raises:
        DataError: A dataset is missing or malformed, or nothing of it can be trained on.
        OSError: The store cannot be written.
    """
    path = folder / fingerprint(spec, tokenizer)
    try:
        store = open_store(path, verify=True, on_chunk=on_chunk)
    except FileNotFoundError:
        store = None
    except DamagedStoreError as error:
        say(f"data: {error}; tokenising again")
        # Aside first: who has it open keeps it, and nobody opens it any more.
        aside = path.with_name(f"{path.name}.damaged-{os.getpid()}")
        path.rename(aside)
        remove_tree(aside)
        store = None
    if store is None:
        with StoreWriter(path) as writer:
            _Builder(spec, tokenizer, writer, on_rows).build()
        store = open_store(path, verify=False)
    notes.write(spec, folder, path.name)
    return store


def open_corpus(run: RunDir, spec: RunSpec) -> Corpus:
    """The corpus of a run, tokenised again where it is gone.

    Raises:
        DataError: As :func:`ensure_store`.
        ModelError: The tokenizer is missing.
    """
    store = ensure_store(spec, load_tokenizer(spec), corpora_dir(spec, run.root))
    return Corpus(store, spec.evaluation.max_rows)


def fingerprint(spec: RunSpec, tokenizer: Any) -> str:
    """Name of a store: a hash of everything that decides its content.

    Raises:
        DataError: A dataset is missing.
    """
    data, token_file = spec.data, spec.model.token_file
    tree = {
        "format": FORMAT,
        "rules": _rules_sha256(data.datasets),
        "tokenizer": tokenizer_sha256(tokenizer),
        "datasets": [
            [content_id(d, token_file), d.format, template_of(d), learn_of(d), d.weight]
            for d in data.datasets
        ],
        "limits": [data.source_tokens, data.target_tokens, data.max_tokens],
        "split": [data.validation_rows, data.validation_seed],
        "packing": data.packing,
    }
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:32]


def _rules_sha256(datasets: tuple[DatasetSection, ...]) -> str:
    """Hash of the code that makes tokens of rows, so that a changed rule makes a new store."""
    modules = [example, formats, packing, reader, tokens, sys.modules[__name__]]
    modules += [load_format(dataset.format) for dataset in datasets]  # type: ignore[misc]
    digest = hashlib.sha256()
    for module in modules:
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


class _Builder:
    """Builds one store."""

    def __init__(
        self,
        spec: RunSpec,
        tokenizer: Any,
        writer: StoreWriter,
        on_rows: Callable[[int, int], None],
    ) -> None:
        self._spec, self._tokenizer = spec, tokenizer
        self._writer, self._on_rows = writer, on_rows
        self._dropped: Counter[str] = Counter()
        self._num_rows = self._num_examples = 0
        # Of each stored sample: its number among all examples, and its dataset's weight.
        self._examples, self._weights = array("q"), array("q")

    def build(self) -> None:
        """Tokenise all datasets, split, pack, and finish the store."""
        data = self._spec.data
        sources = [read_rows(dataset, self._spec.model.token_file) for dataset in data.datasets]
        total = sum(len(rows) for rows in sources)
        # A batch is tokenised, without Python's lock, while the next is read and the last written.
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting: deque[tuple[int, Future[list[Sample | None]]]] = deque()
            for dataset, rows in zip(data.datasets, sources, strict=True):
                for batch in self._example_batches(dataset, rows, total):
                    waiting.append((dataset.weight, pool.submit(self._tokenize, dataset, batch)))
                    if len(waiting) > 1:
                        self._add(*waiting.popleft())
            while waiting:
                self._add(*waiting.popleft())
        arrays = self._split()
        if data.packing:
            lengths = self._writer.lengths[arrays["train"]]
            arrays["pack_offsets"], arrays["pack_members"] = packing.best_fit(
                lengths, capacity=data.sequence_tokens
            )
        pad = self._tokenizer.pad_token_id
        facts = {
            "num_rows": self._num_rows,
            "dropped": dict(self._dropped),
            # Padding is masked, so that any id serves.
            "pad_id": 0 if pad is None else pad,
            "sequence_tokens": data.sequence_tokens,
        }
        self._writer.finish(arrays, facts)

    def _example_batches(
        self, dataset: DatasetSection, rows: Any, total: int
    ) -> Iterator[list[Example]]:
        make = load_format(dataset.format).examples
        batch: list[Example] = []
        bad: list[str] = []
        num_bad, first = 0, self._num_rows
        for row in _rows(rows):
            self._num_rows += 1
            try:
                batch += make(row)
            except Dropped as reason:
                self._dropped[str(reason)] += 1
            except MissingField as error:
                fields = ", ".join(name for name, value in row.items() if value is not None)
                num_bad += 1
                if len(bad) < _SHOWN_BAD_ROWS:
                    bad.append(f"row {self._num_rows - first} {error}; its fields: {fields}")
            # A dataset with bad rows is read to its end for the report, and not tokenised.
            if len(batch) >= _BATCH:
                if not bad:
                    yield batch
                batch = []
            if self._num_rows % _BATCH == 0:
                self._on_rows(self._num_rows, total)
        if bad:
            raise DataError(_bad_rows(dataset, bad, num_bad))
        if batch:
            yield batch
        self._on_rows(self._num_rows, total)

    def _tokenize(self, dataset: DatasetSection, batch: list[Example]) -> list[Sample | None]:
        return tokenize(
            batch,
            self._tokenizer,
            self._spec.data,
            template=template_of(dataset),
            learn=learn_of(dataset),
        )

    def _add(self, weight: int, tokenised: Future[list[Sample | None]]) -> None:
        for sample in tokenised.result():
            if sample is None:
                self._dropped[_NO_ROOM] += 1
            else:
                self._writer.add(sample)
                self._examples.append(self._num_examples)
                self._weights.append(weight)
            self._num_examples += 1

    def _split(self) -> dict[str, npt.NDArray[np.int64]]:
        data = self._spec.data
        train, validation = split(
            self._num_examples, held_out=data.validation_rows, seed=data.validation_seed
        )
        # Number among the examples -> number in the store; -1 for what was left out.
        stored = np.full(self._num_examples, -1, np.int64)
        stored[np.array(self._examples)] = np.arange(len(self._examples))
        train, validation = (ids[ids >= 0] for ids in (stored[train], stored[validation]))
        if len(train) == 0:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in self._dropped.items())
            sources = ", ".join(repr(dataset.source) for dataset in data.datasets)
            raise DataError(
                f"data.source: {sources} leaves nothing to train on"
                + (f": {reasons}" if reasons else "")
            )
        return {
            "train": np.repeat(train, np.array(self._weights, np.int64)[train]),
            "validation": validation,
        }


def split(
    count: int, *, held_out: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Numbers of the examples to train on and of those held out, as the original recipe has them.

    Source: datasets, arrow_dataset.py, Dataset.train_test_split with shuffle.

    Raises:
        DataError: Nothing would be left to train on.
    """
    if held_out == 0:
        return np.arange(count), np.empty(0, np.int64)
    if held_out >= count:
        raise DataError(
            f"data.validation_rows: {held_out} of {count} examples leave nothing to train on; use "
            f"at most {max(count - 1, 0)}"
        )
    order = np.random.default_rng(seed).permutation(count)
    return order[held_out:], order[:held_out]


def _rows(rows: Any) -> Iterator[dict[str, object]]:
    """Rows one by one; read in batches, which is several times as fast."""
    for columns in rows.iter(_BATCH):
        names = list(columns)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _bad_rows(dataset: DatasetSection, shown: list[str], count: int) -> str:
    more = f"\n  and {count - len(shown)} more" if count > len(shown) else ""
    return (
        f"data.source: {dataset.source!r} is not in the format {dataset.format!r}\n  "
        + "\n  ".join(shown)
        + more
    )
