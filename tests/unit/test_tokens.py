"""Tokens and labels by the original collator's rules, worked out by hand.

The tokenizer has one id a word: <unk> 0, <s> 1, </s> 2, and a to j are 3 to 12.
"""

import numpy as np
import pytest

from qlora_dist.data.example import Example
from qlora_dist.data.tokens import tokenize
from qlora_dist.spec import DataSection


@pytest.fixture(scope="module")
def words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


# (source, target, limits, learn, input_ids, labels); -100 is not learned.
X = -100
ROWS = [
    # Prompt and answer with room to spare: BOS before, EOS after, the answer learned.
    ("a b", "c d", (16, 512), "answer", [1, 3, 4, 5, 6, 2], [X, X, X, 5, 6, 2]),
    # An empty source is BOS alone: the OASST1 recipe, all of the text in the target.
    ("", "a b c", (16, 512), "answer", [1, 3, 4, 5, 2], [X, 3, 4, 5, 2]),
    # train_on_source: the prompt's labels are its ids, BOS among them.
    ("a b", "c", (16, 512), "all", [1, 3, 4, 5, 2], [1, 3, 4, 5, 2]),
    # The source's limit counts BOS and cuts its end.
    ("a b c d", "e", (3, 8), "answer", [1, 3, 4, 7, 2], [X, X, X, 7, 2]),
    # A source exactly at its limit is not cut.
    ("a b", "e", (3, 8), "answer", [1, 3, 4, 7, 2], [X, X, X, 7, 2]),
    # The target's limit counts EOS: a target one too long loses EOS only.
    ("a", "b c d", (8, 3), "answer", [1, 3, 4, 5, 6], [X, X, 4, 5, 6]),
    # A target that fits with its EOS keeps it.
    ("a", "b c", (8, 3), "answer", [1, 3, 4, 5, 2], [X, X, 4, 5, 2]),
    # A much longer target keeps its beginning.
    ("a", "b c d e f g", (8, 3), "answer", [1, 3, 4, 5, 6], [X, X, 4, 5, 6]),
    # An empty answer is EOS alone.
    ("a b", "", (8, 8), "answer", [1, 3, 4, 2], [X, X, X, 2]),
    # A prompt that begins with BOS gets no second one.
    ("<s> a", "b", (8, 8), "answer", [1, 3, 4, 2], [X, X, 4, 2]),
    # Unknown words are learned as such; ids are not compared with any padding id.
    ("a", "zz </s> b", (8, 8), "answer", [1, 3, 0, 2, 4, 2], [X, X, 0, 2, 4, 2]),
    # One limit for both: the answer is cut to what the prompt leaves.
    ("a b", "c d e", 5, "answer", [1, 3, 4, 5, 6], [X, X, X, 5, 6]),
    ("a b", "c", 5, "answer", [1, 3, 4, 5, 2], [X, X, X, 5, 2]),
]


@pytest.mark.parametrize(("source", "target", "limits", "learn", "ids", "labels"), ROWS)
def test_ids_and_labels_are_the_original_collators(
    words, source, target, limits, learn, ids, labels
):
    sample = one(words, Example(source, target), limits, learn)
    assert sample.ids.tolist() == ids
    assert np.where(sample.learned, sample.ids, X).tolist() == labels


def one(words, example, limits, learn):
    if isinstance(limits, int):
        data = DataSection(source="x", format="input-output", max_tokens=limits)
    else:
        data = DataSection(
            source="x", format="input-output", source_tokens=limits[0], target_tokens=limits[1]
        )
    return tokenize([example], words, data, template="{source}", learn=learn)[0]


def test_a_prompt_that_fills_the_limit_leaves_no_sample(words):
    assert one(words, Example("a b c d", "e"), 5, "answer") is None
    assert one(words, Example("a b c d", "e"), 6, "answer") is not None


def test_what_was_cut_is_counted(words):
    sample = one(words, Example("a b c d", "e f g"), (3, 3), "answer")
    assert (sample.source_cut, sample.target_cut) == (2, 1)


def test_of_a_conversation_only_the_answers_are_learned(words):
    text = "a b c d e"
    example = Example("", text, ((4, 6), (8, 9)))
    sample = one(words, example, 32, "answer")
    assert sample.learned.tolist() == [False, False, False, True, False, True, True]
    assert one(words, example, 32, "all").learned.all()


def test_the_end_is_learned_where_the_last_words_are_the_assistants(words):
    ends_with_human = Example("", "a b c d e", ((4, 6),))
    assert one(words, ends_with_human, 32, "answer").learned.tolist()[-1:] == [False]
    assert one(words, Example("", "a b", ()), 32, "answer") is None


def test_the_template_surrounds_the_source(words):
    data = DataSection(source="x", format="ptt", max_tokens=32)
    sample = tokenize([Example("b", "c")], words, data, template="a {source} d", learn="answer")[0]
    assert sample.ids.tolist() == [1, 3, 4, 6, 5, 2]
