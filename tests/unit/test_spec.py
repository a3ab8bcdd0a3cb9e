"""A spec is read, or every problem is named with a way out."""

import json
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_dist.errors import PlanError, SpecError
from qlora_dist.plan import Plan, make_plan
from qlora_dist.resume import spec_sha256
from qlora_dist.spec import RunSpec
from qlora_dist.spec_file import load_spec, parse_yaml, spec_from_tree

GOOD = {
    "name": "x",
    "model": {"source": "huggyllama/llama-7b"},
    "data": {"source": "d.jsonl", "format": "oasst1", "max_tokens": 64},
    "schedule": {"steps": 10},
    "strategy": {"kind": "single"},
}


def problems(tree, overrides=()):
    with pytest.raises(SpecError) as error:
        spec_from_tree(tree, overrides)
    return error.value.problems


def test_the_smallest_spec_is_whole_and_survives_json():
    spec = spec_from_tree(GOOD)
    again = RunSpec.model_validate_json(json.dumps(spec.model_dump(mode="json")))
    assert again == spec
    assert spec_sha256(again) == spec_sha256(spec)


def test_overrides_apply_before_validation():
    spec = spec_from_tree(GOOD, ["optimizer.lr=1e-4", "adapter.target=[q_proj, v_proj]"])
    assert spec.optimizer.lr == 1e-4
    assert spec.adapter.target == ["q_proj", "v_proj"]
    assert "optimizer" not in GOOD


def test_all_problems_are_named_at_once():
    found = problems(GOOD, ["optimzer.lr=1", "batch.micro_sice=1", "optimizer.lr=fast", "seed=-1"])
    assert len(found) == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimzer.lr=1", "optimzer: no such key; did you mean optimizer?"),
        ("batch.micro_sice=1", "batch.micro_sice: no such key; did you mean micro_size?"),
        ("optimizer.lr=fast", "for example 0.0002"),
        ("max_tokens=5", "max_tokens: no such key; did you mean data.max_tokens?"),
        ("lr=1.0", "lr: no such key; did you mean optimizer.lr?"),
        ("batch.global_size=true", "batch.global_size: input should be a valid integer"),
        ("batch.global_size=0", "batch.global_size: input should be greater than or equal to 1"),
        ("data.format=oast", "'self-instruct', 'oasst1'"),
        ("data.source_tokens=3", "give either max_tokens, or source_tokens together"),
        ("data.template=hello", "template must contain {source} once"),
        ("schedule.epochs=1", "give either steps or epochs; for example steps: 1875"),
        ("quantization.kind=nf5", "quantization.kind: say which; one of nf4, none"),
        ("quantization.duble=1", "quantization.kind: say which"),
        ("strategy.kind=dpp", "'single', 'ddp'"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.lr=true", "optimizer.lr: input should be a valid number"),
        ("schedule.steps=1" + "0" * 400, "schedule.steps: input should be less than or equal"),
        ("model=3", "model: should be a mapping, got 3"),
        ("name=a b", "name: string should match pattern"),
        ("nonsense", "an override is section.key=value"),
        ("seed=[", "not YAML"),
    ],
)
def test_a_wrong_value_gets_one_line_that_says_what_would_work(override, expected):
    found = problems(GOOD, [override])
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize("key", ["name", "model", "data", "schedule", "strategy"])
def test_a_missing_section_is_named(key):
    tree = {name: value for name, value in GOOD.items() if name != key}
    assert any(line.startswith(f"{key}: is missing") for line in problems(tree))


def test_a_key_given_twice_is_an_error(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(SpecError, match="the key 'seed' is given twice"):
        load_spec(path)


def test_a_missing_file_gets_the_nearest_name(tmp_path):
    (tmp_path / "guanaco-7b.yaml").write_text("")
    with pytest.raises(SpecError, match=r"did you mean .*guanaco-7b\.yaml\?"):
        load_spec(tmp_path / "guanaco-7.yaml")


def test_a_number_in_scientific_notation_is_a_number():
    assert parse_yaml("1e-4", source="") == 1e-4
    assert parse_yaml("16", source="") == 16
    assert isinstance(parse_yaml("16", source=""), int)
    assert parse_yaml("[1.5, .5, 1., -2E+3]", source="") == [1.5, 0.5, 1.0, -2000.0]


def test_a_time_is_text():
    assert spec_from_tree(GOOD, ["resources.time=12:00:00"]).resources.time == "12:00:00"


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(string.printable, max_size=8)
    | st.sampled_from(["x" * 300, "~nobody/x", 10**400, 1e308, -1, 2**40])
    | st.sampled_from(["nf4", "none", "ddp", "single", "oasst1", "huggyllama/llama-7b", "24gib"])
)
keys = st.sampled_from(
    [
        *RunSpec.model_fields,
        *("source", "kind", "r", "lr", "steps", "max_tokens", "shape", "gpus_per_node", "target"),
    ]
) | st.text(string.ascii_letters, max_size=5)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=6)
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(trees)
def test_any_yaml_makes_a_plan_or_our_error(tree):
    text = yaml.safe_dump(tree)
    try:
        result = make_plan(spec_from_tree(parse_yaml(text, source="t")))
    except (SpecError, PlanError):
        return
    assert isinstance(result, Plan)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(keys, trees, max_size=4))
def test_a_good_spec_with_random_parts_makes_a_plan_or_our_error(parts):
    tree = {**GOOD, **parts}
    for name, value in parts.items():
        if isinstance(value, dict) and isinstance(GOOD.get(name), dict):
            tree[name] = {**GOOD[name], **value}
    try:
        result = make_plan(spec_from_tree(tree))
    except (SpecError, PlanError):
        return
    assert isinstance(result, Plan)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_yaml_or_our_error(text):
    message = "t: 1 problem"
    try:
        parse_yaml(text, source="t")
    except SpecError as error:
        message = str(error)
    assert message.startswith("t: 1 problem")


def test_every_default_is_valid_by_itself():
    for name, field in RunSpec.model_fields.items():
        if not field.is_required():
            tree = {**GOOD, name: RunSpec.model_validate(GOOD).model_dump(mode="json")[name]}
            assert spec_from_tree(tree) == spec_from_tree(GOOD)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")))
def test_every_shipped_config_plans(path):
    plan = make_plan(load_spec(path))
    assert plan.spec.name == path.stem
    assert plan.memory.fits in (True, None)


def test_an_adapter_is_lora_unless_it_says_otherwise():
    assert spec_from_tree(GOOD | {"adapter": {"r": 8}}).adapter.kind == "lora"
    full = spec_from_tree(GOOD, ["adapter={kind: none}"]).adapter
    assert (full.kind, full.dtype) == ("none", "fp32")
    with pytest.raises(SpecError) as error:
        spec_from_tree(GOOD, ["adapter={kind: none, r: 8}"])
    assert error.value.problems == ("adapter.r: no key of this kind of adapter",)
    with pytest.raises(SpecError) as error:
        spec_from_tree(GOOD, ["adapter.kind=ia3"])
    assert error.value.problems == ("adapter.kind: say which; one of lora, none",)
