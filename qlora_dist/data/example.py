"""What a format makes of a row."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, as text.

    Attributes:
        source: The prompt, as it is put into the template; may be empty.
        target: The answer.
        answer_spans: Character ranges ``[start, end)`` of ``target`` that are the assistant's own
            words, for targets that hold a whole conversation; None: all of it.
    """

    source: str
    target: str
    answer_spans: tuple[tuple[int, int], ...] | None = None


class Dropped(Exception):
    """A row that its format leaves out on purpose; the message is the reason that is counted."""


class MissingField(Exception):
    """A row lacks a field that its format needs; the message names it."""


def text_field(row: dict[str, object], name: str) -> str:
    """A field that must be there and be text.

    Raises:
        MissingField: It is absent, null, or no text.
    """
    value = row.get(name)
    if value is None:
        raise MissingField(f"has no field {name!r}")
    if not isinstance(value, str):
        raise MissingField(f"has {type(value).__name__}, not text, in field {name!r}")
    return value
