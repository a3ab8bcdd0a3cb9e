"""A corpus as a person sees it: counts, lengths, and samples with the learned tokens marked."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from qlora_dist.data.corpus import Corpus, learn_of, template_of
from qlora_dist.data.tokens import Sample
from qlora_dist.spec import RunSpec

_GREEN, _DIM, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def report(spec: RunSpec, corpus: Corpus) -> dict[str, Any]:
    """Counts and lengths, in the order that they are shown."""
    lengths = corpus.lengths
    cut_sources = sum(1 for sample in corpus.train if sample.source_cut)
    cut_targets = sum(1 for sample in corpus.train if sample.target_cut)
    learned = sum(int(sample.learned.sum()) for sample in corpus.train)
    quantiles = np.quantile(lengths, [0.0, 0.5, 0.9, 1.0]).astype(int).tolist()
    return {
        "format": spec.data.format,
        "template": repr(template_of(spec)),
        "learned": learn_of(spec),
        "rows": corpus.num_rows,
        "training samples": len(corpus.train),
        "held out": len(corpus.validation),
        **{f"left out ({reason})": count for reason, count in corpus.dropped.items()},
        "tokens": int(lengths.sum()),
        "tokens learned": learned,
        "length": "shortest {}, median {}, 90 % under {}, longest {}".format(*quantiles),
        "prompts cut": cut_sources,
        "answers cut": cut_targets,
    }


def samples_text(corpus: Corpus, tokenizer: Any, *, count: int, color: bool) -> str:
    """The first ``count`` training samples, decoded; learned stretches in [[...]] or in green."""
    return "".join(
        f"\n--- sample {index}, {len(sample.ids)} tokens, {int(sample.learned.sum())} learned"
        f"{_cuts(sample)}\n{_marked(sample, tokenizer, color=color)}\n"
        for index, sample in enumerate(corpus.train[:count])
    )


def _cuts(sample: Sample) -> str:
    cuts = [
        f"{what} cut by {tokens}"
        for what, tokens in (("prompt", sample.source_cut), ("answer", sample.target_cut))
        if tokens
    ]
    return "".join(f", {cut}" for cut in cuts)


def _marked(sample: Sample, tokenizer: Any, *, color: bool) -> str:
    opening, closing = (_GREEN, _RESET) if color else ("[[", "]]")
    before, after = (_DIM, _RESET) if color else ("", "")
    parts = []
    for learned, ids in _stretches(sample):
        text = tokenizer.decode(ids)
        parts.append(f"{opening}{text}{closing}" if learned else f"{before}{text}{after}")
    return "".join(parts)


def _stretches(sample: Sample) -> Iterator[tuple[bool, list[int]]]:
    edges = np.flatnonzero(np.diff(sample.learned.astype(np.int8))) + 1
    for marks, ids in zip(
        np.split(sample.learned, edges), np.split(sample.ids, edges), strict=True
    ):
        yield bool(marks[0]), ids.tolist()
