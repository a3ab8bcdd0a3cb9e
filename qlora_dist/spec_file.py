"""YAML to RunSpec: reading, overrides, and one line for each thing that is wrong.

Reading a spec touches no file but its own.
"""

import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qlora_dist.errors import SpecError
from qlora_dist.spec import RunSpec


class _Loader(yaml.SafeLoader):
    """YAML 1.1 less its traps.

    ``1e-4`` is a number, ``12:00:00`` is text and not a count in base 60, and a key that is given
    twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _NUMBERS[1],
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.?[0-9]+[eE][-+]?[0-9]+|\.[0-9]+)$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, source: str) -> object:
    """Parse YAML text, safely.

    Raises:
        SpecError: The text is not YAML; the message has line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise SpecError([f"not YAML: {message}"], source=source) from error
    except (ValueError, RecursionError, TypeError) as error:
        # PyYAML lets these out of odd scalars (dates) and of keys that cannot be hashed.
        raise SpecError([f"not YAML that makes a spec: {error}"], source=source) from error


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a spec from a YAML file.

    Args:
        path: The file.
        overrides: ``section.key=value`` each, the value in YAML; applied before validation.

    Raises:
        SpecError: The file cannot be read, or some keys are wrong; all of them are named.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError([_missing_file(Path(path))], source=str(path)) from None
    except (OSError, ValueError) as error:
        raise SpecError([f"cannot be read: {error}"], source=str(path)) from error
    tree = parse_yaml(text, source=str(path))
    return spec_from_tree(tree, overrides, source=str(path))


def spec_from_tree(
    tree: object, overrides: Sequence[str] = (), *, source: str = "the spec"
) -> RunSpec:
    """Validate a tree of plain values, such as YAML or JSON gives.

    Raises:
        SpecError: Some keys are wrong; all of them are named.
    """
    if not isinstance(tree, dict):
        raise SpecError(["a spec is a mapping with model:, data:, ... at the top"], source=source)
    problems: list[str] = []
    merged = dict(tree)
    for override in overrides:
        problem = _apply(merged, override)
        if problem:
            problems.append(problem)
    if problems:
        raise SpecError(problems, source=source)
    try:
        return RunSpec.model_validate(merged)
    except ValidationError as error:
        items = [item for item in error.errors(include_url=False) if not _other_member(item)]
        raise SpecError(list(dict.fromkeys(map(_describe, items))), source=source) from None
    except (RecursionError, OverflowError) as error:
        raise SpecError([f"too deep or too large: {error}"], source=source) from None


def _missing_file(path: Path) -> str:
    try:
        names = sorted(p.name for p in (path.parent or Path()).iterdir() if p.suffix == ".yaml")
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1)
    return "no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")


def parse_override(text: str) -> tuple[str, str]:
    """Split ``section.key=value``.

    Raises:
        SpecError: It is none.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SpecError(
            [f"{text!r}: an override is section.key=value, for example optimizer.lr=1e-4"]
        )
    return key, value


def _apply(tree: dict[str, Any], override: str) -> str | None:
    """Set one ``section.key=value`` in ``tree``; return a problem, if there is one."""
    try:
        key, value = parse_override(override)
    except SpecError as error:
        return error.problems[0]
    try:
        parsed = parse_yaml(value, source=key)
    except SpecError as error:
        return f"{key}: {error.problems[0]}"
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        child = node.get(name)
        # A copy, so that the caller's tree stays as it was; a scalar in the way is replaced and
        # then found by the validation.
        node[name] = dict(child) if isinstance(child, dict) else {}
        node = node[name]
    node[last] = parsed
    return None


def _other_member(item: Mapping[str, Any]) -> bool:
    """Whether an error is of a union's member that the value was not meant for."""
    wants_text = item["type"] in ("string_type", "literal_error")
    return wants_text and isinstance(item["input"], dict | list) and len(item["loc"]) > 2


def _path(item: Mapping[str, Any]) -> list[str | int]:
    """An error's location without the names that pydantic puts in for members of a union."""
    path: list[str | int] = []
    members: list[type[BaseModel]] = [RunSpec]
    for part in item["loc"]:
        fields = [section.model_fields[part] for section in members if part in section.model_fields]
        if isinstance(part, int) or fields:
            path.append(part)
            # An index stands between a list and its entries, which are of the same sections.
            if fields:
                members = list(_sections_of(fields[0].annotation))
    # It may be a key of another kind of the same section, and is there already.
    if item["type"] == "extra_forbidden" and path[-1:] != [item["loc"][-1]]:
        path.append(item["loc"][-1])
    return path


def _describe(item: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: dotted path, rule, value, and one that would work."""
    location = _path(item)
    path = ".".join(str(part) for part in location) or "the spec"
    kind, value = item["type"], item.get("input")
    if kind == "extra_forbidden":
        if _field_of_any(location):
            return f"{path}: no key of this kind of {location[-2]}"
        return f"{path}: no such key{_nearest(location)}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return f"{path}.kind: say which; one of {', '.join(_kinds(_field_at(location)))}"
    field = _field_at(location)
    if kind == "missing":
        example = _example(field)
        return f"{path}: is missing" + (f"; for example {example}" if example else "")
    message = item["msg"].removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "should be a mapping"
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        return f"{path}: {message}"
    plain = isinstance(value, str | int | float | bool | None)
    shown = repr(value) if plain else type(value).__name__
    example = _example(field)
    hint = f"; for example {example}" if example and kind != "literal_error" else ""
    return f"{path}: {message}, got {shown[:80]}{hint}"


def _nearest(location: Sequence[str | int]) -> str:
    section = _section_at(location[:-1])
    if section is None:
        return ""
    homes = [
        f"{name}.{location[-1]}"
        for name, field in RunSpec.model_fields.items()
        if any(location[-1] in home.model_fields for home in _sections_of(field.annotation))
    ]
    if len(location) == 1 and homes:
        return f"; did you mean {' or '.join(homes)}?"
    names = list(section.model_fields)
    near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(names)}"


def _sections_of(annotation: object) -> Iterable[type[BaseModel]]:
    """The Section classes inside an annotation such as ``list[Annotated[A | B, ...]]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated, list):
        for part in get_args(annotation):
            yield from _sections_of(part)


def _section_at(location: Sequence[str | int]) -> type[BaseModel] | None:
    section: type[BaseModel] = RunSpec
    for part in location:
        field = section.model_fields.get(str(part))
        found = next(iter(_sections_of(field.annotation)), None) if field else None
        if found is None:
            return None
        section = found
    return section


def _field_at(location: Sequence[str | int]) -> FieldInfo | None:
    section = _section_at(location[:-1]) if location else None
    return section.model_fields.get(str(location[-1])) if section else None


def _field_of_any(location: Sequence[str | int]) -> bool:
    """Whether another kind of the section has such a key."""
    field = _field_at(location[:-1])
    sections = _sections_of(field.annotation) if field else ()
    return any(location[-1] in section.model_fields for section in sections)


def _kinds(field: FieldInfo | None) -> list[str]:
    """What a section's kind may be."""
    sections = _sections_of(field.annotation) if field else ()
    return [section.model_fields["kind"].default for section in sections]


def _example(field: FieldInfo | None) -> str | None:
    if field is None:
        return None
    if field.examples:
        return str(field.examples[0])
    if field.is_required():
        return None
    default = field.get_default(call_default_factory=False)
    if isinstance(default, str | int | float | bool):
        return str(default).lower() if isinstance(default, bool) else str(default)
    return None
