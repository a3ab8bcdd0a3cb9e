"""Rows in their published layouts become prompts and answers."""

import pytest

from qlora_dist.data.example import Dropped, Example, MissingField
from qlora_dist.data.formats import FORMATS, load_format
from qlora_dist.spec import DatasetSection


def examples(name, row):
    return load_format(name).examples(row)


def test_every_format_of_the_spec_is_in_the_table_and_loads():
    names = DatasetSection.model_fields["format"].annotation.__args__
    assert set(names) == set(FORMATS)
    for name in names:
        module = load_format(name)
        assert "{source}" in module.TEMPLATE
        assert "{source}" in module.QUESTION
        assert module.LEARN in ("answer", "all")


def test_input_output_is_used_as_it_is():
    row = {"input": " q ", "output": "a\n", "other": 1}
    assert examples("input-output", row) == [Example(" q ", "a\n")]


def test_self_instruct_reads_both_layouts():
    row = {"prompt": "Do it\n\nOutput:", "completion": " done"}
    assert examples("self-instruct", row) == [Example("Do it\n\nOutput:", " done")]
    seed = {
        "instruction": "Add. ",
        "instances": [{"input": "1 2", "output": "3 "}, {"input": "", "output": "0"}],
    }
    assert examples("self-instruct", seed) == [
        Example("Add.\n\nInput: 1 2\n\nOutput:", " 3"),
        Example("Add.\n\nOutput:", " 0"),
    ]


def test_oasst1_maps_the_whole_conversation_to_the_target_and_knows_the_answers():
    text = "### Human: Hi### Assistant: Hello### Human: Bye### Assistant: Bye bye"
    (example,) = examples("oasst1", {"text": text})
    assert (example.source, example.target) == ("", text)
    assert [text[a:b] for a, b in example.answer_spans] == [" Hello", " Bye bye"]


def test_oasst1_joins_a_prompt_and_its_answer():
    row = {"input": "### Human: Hi ### Assistant:", "output": "Hello"}
    (example,) = examples("oasst1", row)
    assert example.target == "### Human: Hi ### Assistant: Hello"


def test_ptt_reads_both_layouts():
    expected = [Example("為什麼", "因為")]
    assert examples("ptt", {"text": "為什麼\t因為"}) == expected
    assert examples("ptt", {"question": "為什麼", "answer": "因為"}) == expected


@pytest.mark.parametrize(
    "row", [{"text": "問\t沒有資料"}, {"question": "問", "answer": "沒有資料"}, {"text": " "}]
)
def test_ptt_leaves_out_rows_without_an_answer(row):
    with pytest.raises(Dropped):
        examples("ptt", row)


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("ptt", {"text": "no tab here"}, "has no tab"),
        ("ptt", {"question": "q"}, "has no field 'answer'"),
        ("input-output", {"input": "q"}, "has no field 'output'"),
        ("input-output", {"input": "q", "output": 3}, "has int, not text"),
        ("self-instruct", {"instances": "x", "instruction": "y"}, "has no list of instances"),
        ("oasst1", {"messages": []}, "has no field 'input'"),
    ],
)
def test_a_row_without_its_fields_is_named(name, row, expected):
    with pytest.raises(MissingField, match=expected):
        examples(name, row)
