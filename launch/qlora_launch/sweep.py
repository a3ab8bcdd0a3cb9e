"""One config and lists of values to several runs of one folder."""

import itertools
import re
from collections.abc import Sequence

from qlora_dist.errors import SpecError
from qlora_dist.layout import run_dir_of
from qlora_dist.spec import RunSpec
from qlora_dist.spec_file import load_spec, parse_override


def sweep_specs(config: str, overrides: Sequence[str], lists: Sequence[str]) -> list[RunSpec]:
    """The runs of a sweep: every combination, the last list's values changing fastest.

    Args:
        config: The YAML file.
        overrides: What holds for all, ``key=value``.
        lists: What differs, ``key=value,value,...``.

    Raises:
        SpecError: A list is none, or a combination is no spec.
    """
    axes = [_axis(text) for text in lists]
    base = run_dir_of(load_spec(config, overrides))
    specs = []
    for values in itertools.product(*axes):
        spec = load_spec(config, [*overrides, *(f"{key}={value}" for key, value in values)])
        label = "_".join(_label(key, value) for key, value in values)
        name = f"{spec.name}_{label}"[:100]
        specs.append(spec.model_copy(update={"name": name, "run_dir": str(base / label)}))
    names = [spec.run_dir for spec in specs]
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise SpecError([f"--sweep: {', '.join(twice)} would be two runs"], source="the sweep")
    return specs


def _axis(text: str) -> list[tuple[str, str]]:
    key, value = parse_override(text)
    if key.startswith(("resources.", "run_dir", "name")):
        raise SpecError(
            [f"--sweep: {key} is the same for all; a sweep is one array of equal jobs"],
            source="the sweep",
        )
    return [(key, each) for each in _split(value)]


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket, so that a value may be a list."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _label(key: str, value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-.")
