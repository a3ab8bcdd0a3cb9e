"""OpenAssistant conversations as Guanaco was trained on them.

``text`` holds "### Human: ...### Assistant: ..." with as many turns as there are
(timdettmers/openassistant-guanaco); ``input`` and ``output`` hold the same, cut before the last
answer. The original recipe maps the whole text to the target, so all of it is learned; with
``learn: answer`` only the assistant's turns are.
"""

import re
from typing import Literal

from qlora_dist.data.example import Dropped, Example, text_field

TEMPLATE = "{source}"
QUESTION = "### Human: {source}### Assistant:"
LEARN: Literal["answer", "all"] = "all"

_TURN = re.compile(r"### (Human|Assistant):")


def examples(row: dict[str, object]) -> list[Example]:
    """One example a conversation, all of it in the target."""
    if row.get("text") is not None:
        text = text_field(row, "text")
    else:
        prompt, answer = text_field(row, "input"), text_field(row, "output")
        gap = "" if prompt.endswith(" ") or answer.startswith((" ", "\n")) else " "
        text = prompt + gap + answer
    if not text.strip():
        raise Dropped("an empty conversation")
    return [Example("", text, _answers(text))]


def _answers(text: str) -> tuple[tuple[int, int], ...]:
    """Ranges of what stands between "### Assistant:" and the next turn."""
    turns = list(_TURN.finditer(text))
    ends = [turn.start() for turn in turns[1:]] + [len(text)]
    return tuple(
        (turn.end(), end)
        for turn, end in zip(turns, ends, strict=True)
        if turn.group(1) == "Assistant"
    )
