"""A corpus as a person sees it: counts, lengths, and samples with the learned tokens marked."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from qlora_dist.data.corpus import Corpus
from qlora_dist.data.formats import learn_of, template_of
from qlora_dist.data.schedule import corpus_facts
from qlora_dist.data.tokens import Sample
from qlora_dist.spec import RunSpec

_GREEN, _DIM, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def report(spec: RunSpec, corpus: Corpus) -> dict[str, Any]:
    """Counts and lengths, in the order that they are shown."""
    facts, arrays = corpus_facts(spec, corpus), corpus.store.arrays
    train = arrays["train"]
    lengths = np.diff(arrays["offsets"])[train]
    cuts = np.count_nonzero(arrays["cuts"][train], axis=0).tolist()
    quantiles = np.quantile(lengths, [0.0, 0.5, 0.9, 1.0]).astype(int).tolist()
    packed = {}
    if spec.data.packing:
        fill = facts.num_tokens / facts.num_sequences / spec.data.sequence_tokens
        packed["sequences"] = f"{facts.num_sequences}, packed, {fill:.2%} full"
    return {
        **_datasets(spec),
        "rows": corpus.store.facts["num_rows"],
        "training samples": facts.num_samples,
        "held out": len(corpus.validation),
        **{f"left out ({why})": count for why, count in corpus.store.facts["dropped"].items()},
        "tokens": facts.num_tokens,
        "tokens learned": int(arrays["targets"][train].sum()),
        "length": "shortest {}, median {}, 90 % under {}, longest {}".format(*quantiles),
        "prompts cut": cuts[0],
        "answers cut": cuts[1],
        **packed,
        "useful": f"{facts.useful:.1%} of a batch of {spec.batch.micro_size}, the rest padding",
        "kept in": str(corpus.store.path),
    }


def _datasets(spec: RunSpec) -> dict[str, Any]:
    datasets = spec.data.datasets
    if len(datasets) == 1:
        return {
            "format": datasets[0].format,
            "template": repr(template_of(datasets[0])),
            "learned": learn_of(datasets[0]),
        }
    return {
        f"dataset {number}": f"{d.source}, {d.format}, {learn_of(d)} learned, weight {d.weight}"
        for number, d in enumerate(datasets, start=1)
    }


def samples_text(corpus: Corpus, tokenizer: Any, *, count: int, color: bool) -> str:
    """The first ``count`` training sequences, decoded; learned stretches in [[...]] or in green."""
    return "".join(
        f"\n--- sequence {index}, sample {place}, {len(sample.ids)} tokens, {sample.num_targets} "
        f"learned{_cuts(sample)}\n{_marked(sample, tokenizer, color=color)}\n"
        for index in range(min(count, corpus.num_sequences))
        for place, sample in enumerate(corpus.documents(index))
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
