"""Write docs/config.md and docs/cli.md from the spec and the parser; --check only compares."""

import argparse
import os
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

# argparse wraps at the terminal's width.
os.environ["COLUMNS"] = "96"

from qlora_dist.spec import RunSpec
from qlora_launch.parser import make_parser

ROOT = Path(__file__).parent.parent


def config_page() -> str:
    """Every key of a config, section by section."""
    parts = [
        "# The config file",
        "",
        "Made from `qlora_dist/spec.py` by `make docs`. One YAML file describes a run; a key that "
        "is not listed here is an error. Any key can be given on the command line as "
        "`section.key=value`.",
        "",
    ]
    top = {n: f for n, f in RunSpec.model_fields.items() if not list(sections(f.annotation))}
    parts += ["## Top level", "", *table(top)]
    for name, field in RunSpec.model_fields.items():
        choices = sections(field.annotation)
        for section in choices:
            title = name
            if len(choices) > 1:
                title += f", kind {section.model_fields['kind'].default}"
            parts += ["", f"## {title}", "", clean(section.__doc__), ""]
            parts += table(section.model_fields)
    return "\n".join(parts) + "\n"


def sections(annotation: Any) -> list[type[BaseModel]]:
    """Section classes inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [s for part in get_args(annotation) for s in sections(part)]
    return []


def table(fields: dict[str, FieldInfo]) -> list[str]:
    """A Markdown table of fields."""
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = (
            "required"
            if field.is_required()
            else shown(field.get_default(call_default_factory=True))
        )
        rows.append(
            f"| `{name}` | {kind(field.annotation)} | {default} | {clean(field.description)} |"
        )
    return rows


def shown(value: Any) -> str:
    """A default as YAML would have it."""
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def kind(annotation: Any) -> str:
    """An annotation in a reader's words."""
    origin, names = get_origin(annotation), {int: "integer", float: "number", str: "text"}
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if origin is Annotated:
        return kind(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        parts = [kind(part) for part in get_args(annotation) if part is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if origin is list:
        return f"list of {kind(get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ", ".join(annotation.model_fields)
    if annotation is bool:
        return "`true` or `false`"
    return names.get(annotation, str(annotation))


def clean(text: str | None) -> str:
    """A docstring on one line."""
    return " ".join((text or "").split()).replace("|", "\\|")


def cli_page() -> str:
    """Help of every command."""
    parser = make_parser()
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parts = ["# The command line", "", "Made from `qlora --help` by `make docs`.", ""]
    parts += ["```", parser.format_help().rstrip(), "```"]
    for name, verb in verbs.choices.items():
        parts += ["", f"## qlora {name}", "", "```", verb.format_help().rstrip(), "```"]
    parts += [
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | something failed; the message and the log that it names say what |",
        "| 2 | the config, the data or the command is wrong; nothing was started |",
        "| 85 | stopped, every complete step saved; `qlora resume` goes on |",
        "| 86 | the same, for the job's time was nearly over |",
        "| 87 | no process got on for `resources.timeout_s`; the stacks are in the logs |",
        "| 88 | this machine lacks what the run needs of it |",
        "| 93 | the loss is not a number; a restart would only repeat it |",
        "| 130 | interrupted outside of a run |",
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write the pages, or compare them with what is there."""
    check = "--check" in sys.argv[1:]
    stale = []
    for name, text in (("config.md", config_page()), ("cli.md", cli_page())):
        path = ROOT / "docs" / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not check:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        print(
            f"{path.relative_to(ROOT)}: {'is out of date; run make docs' if check else 'written'}"
        )
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
