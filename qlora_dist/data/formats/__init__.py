"""Dataset formats: a module each, found in one table.

A format module has ``TEMPLATE`` (text of the prompt, with {source} where the row's own goes),
``QUESTION`` (the same for a question that a person asks the trained model), ``LEARN`` (what its
original recipe learns, "answer" or "all") and ``examples(row)``, which returns the row's examples
or raises ``Dropped`` or ``MissingField``.
"""

import importlib
from typing import Literal, Protocol

from qlora_dist.data.example import Example
from qlora_dist.spec import DatasetSection

FORMATS: dict[str, str] = {
    "self-instruct": "qlora_dist.data.formats.self_instruct",
    "oasst1": "qlora_dist.data.formats.oasst1",
    "input-output": "qlora_dist.data.formats.input_output",
    "ptt": "qlora_dist.data.formats.ptt",
}


class Format(Protocol):
    """What a format module offers."""

    TEMPLATE: str
    QUESTION: str
    LEARN: Literal["answer", "all"]

    def examples(self, row: dict[str, object]) -> list[Example]:
        """Examples of one row."""
        ...


def load_format(name: str) -> Format:
    """Import the format that a spec names."""
    return importlib.import_module(FORMATS[name])


def template_of(dataset: DatasetSection) -> str:
    """The prompt's template: the dataset's own, or its format's."""
    return dataset.template or load_format(dataset.format).TEMPLATE


def learn_of(dataset: DatasetSection) -> str:
    """What is learned, "answer" or "all"."""
    return load_format(dataset.format).LEARN if dataset.learn == "auto" else dataset.learn


def prompt_of(dataset: DatasetSection, question: str) -> str:
    """A question in the template that the dataset's answers were learned after."""
    template = dataset.template or load_format(dataset.format).QUESTION
    return template.replace("{source}", question)
