"""What of a spec may change when a run goes on, and what would be another run."""

import pytest

from qlora_dist.errors import PlanError, SpecError
from qlora_dist.resume import (
    CHECKED_BY_CONTENT,
    FREE,
    NOT_THE_SAME_BITS,
    check_change,
    spec_sha256,
)
from qlora_dist.spec import DatasetSection, Nf4Quantization, RunSpec
from qlora_dist.spec_file import spec_from_tree
from tests.unit.test_spec import GOOD


def keys_of(model, prefix=""):
    for name, field in model.model_fields.items():
        inner = field.annotation
        if hasattr(inner, "model_fields"):
            yield f"{prefix}{name}"
            yield from keys_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_tables_name_keys_that_there_are():
    # Of sections that are one of several.
    inner = {f"data.mix.{name}" for name in DatasetSection.model_fields}
    inner |= {f"quantization.{name}" for name in Nf4Quantization.model_fields}
    assert set(keys_of(RunSpec)) | inner >= FREE | NOT_THE_SAME_BITS | CHECKED_BY_CONTENT
    assert not FREE & NOT_THE_SAME_BITS


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "run_dir=/elsewhere",
        "checkpoint.every_steps=7",
        "checkpoint.keep_best=false",
        "tracking.kind=tensorboard",
        "resources.timeout_s=60",
        "data.source=moved.jsonl",
    ],
)
def test_where_and_how_often_is_free(override):
    before, now = spec_from_tree(GOOD), spec_from_tree(GOOD, [override])
    assert check_change(before, now) == []
    assert spec_sha256(before) == spec_sha256(now)


@pytest.mark.parametrize(
    "override",
    ["schedule.steps=99", "batch.micro_size=2", "strategy.kind=fsdp", "resources.gpus_per_node=2"],
)
def test_what_changes_the_bits_is_said(override):
    before, now = spec_from_tree(GOOD), spec_from_tree(GOOD, [override])
    (line,) = check_change(before, now)
    assert line.startswith(override.partition("=")[0])
    assert line.endswith("not bit for bit the same")
    assert spec_sha256(before) == spec_sha256(now)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed: was 0, is 1"),
        ("optimizer.lr=1.0", "optimizer.lr: was 0.0002, is 1.0"),
        ("batch.global_size=32", "batch.global_size: was 16, is 32"),
        ("quantization.kind=none", "quantization.kind: was 'nf4', is 'none'"),
        ("adapter.r=8", "adapter.r: was 64, is 8"),
        ("data.packing=true", "data.packing: was False, is True"),
        ("data.validation_rows=1", "data.validation_rows: was 0, is 1"),
    ],
)
def test_what_the_run_is_may_not_change(override, message):
    before, now = spec_from_tree(GOOD), spec_from_tree(GOOD, [override])
    with pytest.raises(PlanError) as error:
        check_change(before, now)
    assert message in str(error.value)
    assert "What may change: " in str(error.value)
    assert spec_sha256(before) != spec_sha256(now)


def test_a_mix_reads_back_from_json():
    mix = [{"source": "a.jsonl", "format": "ptt"}, {"source": "b", "format": "oasst1", "weight": 2}]
    spec = spec_from_tree({**GOOD, "data": {"mix": mix, "max_tokens": 9}})
    assert spec_from_tree(spec.model_dump(mode="json")) == spec
    assert [dataset.weight for dataset in spec.data.datasets] == [1, 2]


def test_a_mix_may_move_and_not_change():
    def make(source, weight):
        mix = [
            {"source": source, "format": "ptt"},
            {"source": "b", "format": "ptt", "weight": weight},
        ]
        return spec_from_tree({**GOOD, "data": {"mix": mix, "max_tokens": 9}})

    assert check_change(make("a.txt", 1), make("elsewhere/a.txt", 1)) == []
    with pytest.raises(PlanError, match=r"data\.mix\.1\.weight: was 1, is 2"):
        check_change(make("a.txt", 1), make("a.txt", 2))


def test_a_mistake_inside_a_mix_is_named_by_its_key():
    mix = [{"source": "a.txt", "weight": 0, "fromat": "ptt"}]
    with pytest.raises(SpecError) as error:
        spec_from_tree({**GOOD, "data": {"mix": mix, "max_tokens": 9}})
    lines = [line.partition(":")[0] for line in error.value.problems]
    assert sorted(lines) == ["data.mix.0.format", "data.mix.0.fromat", "data.mix.0.weight"]


@pytest.mark.parametrize("key", ["source=a.jsonl", "format=ptt", "learn=all"])
def test_a_mix_beside_a_single_dataset_is_refused(key):
    mix = [{"source": "a.jsonl", "format": "ptt"}]
    with pytest.raises(SpecError, match="mix lists the datasets"):
        spec_from_tree({**GOOD, "data": {"mix": mix, "max_tokens": 9}}, [f"data.{key}"])
