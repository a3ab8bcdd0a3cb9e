"""Self-Instruct, in both published layouts.

* ``prompt`` and ``completion``: the fine-tuning file (yizhongw/self_instruct on the hub).
* ``instruction`` and ``instances`` (a list of ``input`` and ``output``): the seed tasks. Their
  prompt is put together as in the original's prepare_for_finetuning.py.
"""

from typing import Literal

from qlora_dist.data.example import Dropped, Example, MissingField, text_field

TEMPLATE = "{source}"
QUESTION = TEMPLATE
LEARN: Literal["answer", "all"] = "answer"


def examples(row: dict[str, object]) -> list[Example]:
    """One example a row, or one an instance of a seed task."""
    if row.get("instances") is None:
        return [Example(text_field(row, "prompt"), text_field(row, "completion"))]
    instruction = text_field(row, "instruction").strip()
    instances = row["instances"]
    if not isinstance(instances, list) or not all(isinstance(item, dict) for item in instances):
        raise MissingField("has no list of instances in field 'instances'")
    if not instances:
        raise Dropped("a task without instances")
    return [_seed_example(instruction, item) for item in instances]


def _seed_example(instruction: str, instance: dict[str, object]) -> Example:
    given = instance.get("input") or ""
    middle = f"\n\nInput: {given}" if given else ""
    return Example(
        f"{instruction}{middle}\n\nOutput:",
        f" {text_field(instance, 'output').strip()}",
    )
