"""A run's samples: read, formatted, tokenised and split."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_dist.data.example import Dropped, Example, MissingField
from qlora_dist.data.formats import load_format
from qlora_dist.data.reader import read_rows
from qlora_dist.data.tokens import Sample, tokenize
from qlora_dist.errors import DataError, ModelError
from qlora_dist.hub import explain, looks_like_path, read_token
from qlora_dist.spec import RunSpec

_BATCH = 1000
_SHOWN_BAD_ROWS = 3


@dataclass(frozen=True)
class Corpus:
    """Samples of a run.

    Attributes:
        train: Samples to train on, in the order of the source.
        validation: Samples held out.
        num_rows: Rows that were read.
        dropped: Reason -> examples that were left out for it.
    """

    train: Sequence[Sample]
    validation: Sequence[Sample]
    num_rows: int
    dropped: dict[str, int]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each training sample, int64 of shape ``(samples,)``."""
        return np.array([len(sample.ids) for sample in self.train], np.int64)

    def sha256(self) -> str:
        """Fingerprint of all tokens and learned marks, in their order."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8, "little"))
            for sample in part:
                digest.update(len(sample.ids).to_bytes(8, "little"))
                digest.update(sample.ids.tobytes())
                digest.update(np.packbits(sample.learned).tobytes())
        return digest.hexdigest()


def load_tokenizer(spec: RunSpec) -> Any:
    """The model's tokenizer, padding on the right.

    Raises:
        ModelError: It is missing or gated, or has no EOS token.
    """
    from transformers import AutoTokenizer

    model = spec.model
    if looks_like_path(model.source) and not Path(model.source).expanduser().is_dir():
        raise ModelError(f"model.source: there is no folder {model.source!r}")
    source = model.source
    if Path(source).expanduser().is_dir():
        source = str(Path(source).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=model.revision,
            padding_side="right",
            trust_remote_code=model.trust_remote_code,
            token=read_token(model.token_file),
        )
    except (OSError, ValueError) as error:
        message = explain(error, kind="tokenizer", key="model.source", source=model.source)
        raise ModelError(message) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.source: the tokenizer of {model.source!r} has no EOS token")
    return tokenizer


def load_corpus(spec: RunSpec, tokenizer: Any) -> Corpus:
    """Read and tokenise the whole corpus.

    Raises:
        DataError: It is missing or malformed, or nothing of it can be trained on.
    """
    examples, dropped, num_rows = _examples(spec)
    samples = _tokenize_all(spec, tokenizer, examples)
    train_ids, validation_ids = _split(spec, len(samples))
    for index in (*train_ids, *validation_ids):
        if samples[index] is None:
            dropped["the prompt leaves no room for an answer within the limit"] += 1
    train = [s for i in train_ids if (s := samples[i]) is not None]
    validation = [s for i in validation_ids if (s := samples[i]) is not None]
    if spec.evaluation.max_rows is not None:
        validation = validation[: spec.evaluation.max_rows]
    if not train:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in dropped.items())
        raise DataError(
            f"data.source: {spec.data.source!r} leaves nothing to train on"
            + (f": {reasons}" if reasons else "")
        )
    return Corpus(train, validation, num_rows, dict(dropped))


def prompt_of(spec: RunSpec, question: str) -> str:
    """A question in the template that the run's answers were learned after."""
    template = spec.data.template or load_format(spec.data.format).QUESTION
    return template.replace("{source}", question)


def template_of(spec: RunSpec) -> str:
    """The prompt's template: the spec's, or the format's."""
    return spec.data.template or load_format(spec.data.format).TEMPLATE


def learn_of(spec: RunSpec) -> str:
    """What is learned, "answer" or "all"."""
    learn = spec.data.learn
    return load_format(spec.data.format).LEARN if learn == "auto" else learn


def _examples(spec: RunSpec) -> tuple[list[Example], Counter[str], int]:
    make = load_format(spec.data.format).examples
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    bad: list[str] = []
    number = 0
    for number, row in enumerate(read_rows(spec), start=1):
        try:
            examples += make(row)
        except Dropped as reason:
            dropped[str(reason)] += 1
        except MissingField as error:
            bad.append(f"row {number} {error}; its fields: {', '.join(_there(row))}")
    if bad:
        more = f"\n  and {len(bad) - _SHOWN_BAD_ROWS} more" if len(bad) > _SHOWN_BAD_ROWS else ""
        raise DataError(
            f"data.source: {spec.data.source!r} is not in the format {spec.data.format!r}\n  "
            + "\n  ".join(bad[:_SHOWN_BAD_ROWS])
            + more
        )
    return examples, dropped, number


def _there(row: dict[str, object]) -> list[str]:
    """Fields that the row itself has; the reader fills in those that other rows have."""
    return [name for name, value in row.items() if value is not None]


def _tokenize_all(
    spec: RunSpec, tokenizer: Any, examples: Sequence[Example]
) -> list[Sample | None]:
    samples: list[Sample | None] = []
    for start in range(0, len(examples), _BATCH):
        samples += tokenize(
            examples[start : start + _BATCH],
            tokenizer,
            spec.data,
            template=template_of(spec),
            learn=learn_of(spec),
        )
    return samples


def _split(spec: RunSpec, count: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out, as the original recipe splits them."""
    held_out = spec.data.validation_rows
    if held_out == 0:
        return list(range(count)), []
    if held_out >= count:
        raise DataError(
            f"data.validation_rows: {held_out} of {count} examples leave nothing to train on; use "
            f"at most {max(count - 1, 0)}"
        )
    from datasets import Dataset

    split = Dataset.from_dict({"index": range(count)}).train_test_split(
        test_size=held_out, shuffle=True, seed=spec.data.validation_seed
    )
    return list(split["train"]["index"]), list(split["test"]["index"])
