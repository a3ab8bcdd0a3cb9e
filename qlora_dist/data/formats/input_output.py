"""Rows with the fields ``input`` and ``output``, used as they are."""

from typing import Literal

from qlora_dist.data.example import Example, text_field

TEMPLATE = "{source}"
QUESTION = TEMPLATE
LEARN: Literal["answer", "all"] = "answer"


def examples(row: dict[str, object]) -> list[Example]:
    """One example a row."""
    return [Example(text_field(row, "input"), text_field(row, "output"))]
