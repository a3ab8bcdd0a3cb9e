"""The PTT Gossiping corpus (zake7749/Gossiping-Chinese-Corpus), in both published layouts.

Text lines ``question<TAB>answer``, or rows with the fields ``question`` and ``answer``. The corpus
writes 沒有資料 ("no data") where a question got no usable answer; those rows are left out.
"""

from typing import Literal

from qlora_dist.data.example import Dropped, Example, MissingField, text_field

TEMPLATE = "### Human: {source}\n### Assistant: "
QUESTION = TEMPLATE
LEARN: Literal["answer", "all"] = "answer"

NO_ANSWER = "沒有資料"


def examples(row: dict[str, object]) -> list[Example]:
    """One example a row."""
    if "text" in row and "question" not in row:
        line = text_field(row, "text")
        if not line.strip():
            raise Dropped("an empty line")
        question, tab, answer = line.partition("\t")
        if not tab:
            raise MissingField("has no tab between question and answer")
    else:
        question, answer = text_field(row, "question"), text_field(row, "answer")
    question, answer = question.strip(), answer.strip()
    if not question or not answer:
        raise Dropped("an empty question or answer")
    if answer == NO_ANSWER:
        raise Dropped(f"the answer is {NO_ANSWER}")
    return [Example(question, answer)]
