"""Tokens and learned marks of an example: the original QLoRA collator's rules.

Source: artidoro/qlora, qlora.py, DataCollatorForCausalLM. Prompt and answer are tokenised apart;
the prompt begins with the tokenizer's BOS, the answer ends with EOS; each is cut at its own limit,
which takes the EOS of an answer that is too long. Two departures: a prompt whose text itself begins
with BOS gets no second one, and padding is told apart by position, never by its id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_dist.data.example import Example
from qlora_dist.spec import DataSection


@dataclass(frozen=True)
class Sample:
    """One tokenised example.

    Attributes:
        ids: int32 of shape ``(tokens,)``.
        learned: bool of shape ``(tokens,)``: which tokens are targets of the loss.
        source_cut: Tokens that the prompt lost to its limit.
        target_cut: Tokens that the answer lost, its EOS counted.
    """

    ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    source_cut: int
    target_cut: int

    @property
    def num_targets(self) -> int:
        """Tokens that the loss counts; the first has nothing to be predicted from."""
        return int(np.count_nonzero(self.learned[1:]))


def tokenize(
    examples: Sequence[Example], tokenizer: Any, data: DataSection, *, template: str, learn: str
) -> list[Sample | None]:
    """Tokenise examples.

    Args:
        examples: At least one.
        tokenizer: A Hugging Face tokenizer with an EOS token.
        data: Limits.
        template: Prompt with {source} in it.
        learn: "answer" or "all".

    Returns:
        A sample an example; None where no learned token is left (the prompt fills the limit).
    """
    prompts = [template.replace("{source}", e.source) for e in examples]
    sources = _ids(tokenizer, prompts)
    spans = learn == "answer" and any(e.answer_spans is not None for e in examples)
    encoded = tokenizer(
        [e.target for e in examples], add_special_tokens=False, return_offsets_mapping=spans
    )
    # Attributes of a tokenizer are looked up in tables each time.
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    samples: list[Sample | None] = []
    for index, example in enumerate(examples):
        source = _with_bos(bos, sources[index])
        target = encoded["input_ids"][index]
        marks = np.ones(len(target) + 1, bool)
        if spans and example.answer_spans is not None:
            starts = np.array([start for start, _ in encoded["offset_mapping"][index]])
            marks[:-1] = _inside(starts, example.answer_spans)
            # EOS is the assistant's where the last words are.
            last = max((end for _, end in example.answer_spans), default=0)
            marks[-1] = last >= len(example.target.rstrip())
        samples.append(_cut(source, [*target, eos], marks, data, learn_source=learn == "all"))
    return samples


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # Some tokenizers refuse empty strings in a batch.
    wanted = [text for text in texts if text]
    found = iter(tokenizer(wanted, add_special_tokens=False)["input_ids"] if wanted else [])
    return [next(found) if text else [] for text in texts]


def _with_bos(bos: int | None, ids: list[int]) -> list[int]:
    if bos is None or ids[:1] == [bos]:
        return ids
    return [bos, *ids]


def _inside(
    starts: npt.NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> npt.NDArray[np.bool_]:
    inside = np.zeros(len(starts), bool)
    for first, end in spans:
        inside |= (starts >= first) & (starts < end)
    return inside


def _cut(
    source: list[int],
    target: list[int],
    marks: npt.NDArray[np.bool_],
    data: DataSection,
    *,
    learn_source: bool,
) -> Sample | None:
    if data.max_tokens is not None:
        source_limit = data.max_tokens
        target_limit = max(0, data.max_tokens - len(source))
    else:
        assert data.source_tokens is not None
        assert data.target_tokens is not None
        source_limit, target_limit = data.source_tokens, data.target_tokens
    kept_source, kept_target = source[:source_limit], target[:target_limit]
    ids = np.array(kept_source + kept_target, np.int32)
    learned = np.concatenate([np.full(len(kept_source), learn_source), marks[: len(kept_target)]])
    # The first token has nothing before it to be predicted from.
    if not kept_target or not learned[1:].any():
        return None
    return Sample(ids, learned, len(source) - len(kept_source), len(target) - len(kept_target))
