"""The tokenised corpus: what it holds, when it is made anew, and when it is not."""

import json

import numpy as np
import pytest

from qlora_dist.data import build, notes
from qlora_dist.data.build import ensure_store, fingerprint, split
from qlora_dist.data.corpus import Corpus
from qlora_dist.data.example import Example
from qlora_dist.data.formats import template_of
from qlora_dist.data.schedule import corpus_facts, make_schedule
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.data.tokens import tokenize
from qlora_dist.errors import DataError
from qlora_dist.spec_file import spec_from_tree


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def make_spec(tiny_model, data, **changes):
    return spec_from_tree(
        {
            "name": "x",
            "model": {"source": str(tiny_model)},
            "data": {"max_tokens": 64, **data},
            "schedule": {"steps": 1},
            "strategy": {"kind": "single"},
            **changes,
        }
    )


@pytest.fixture
def pairs(tiny_model, pairs_file):
    """The spec of a small corpus, changed by keyword arguments."""

    def make(**data):
        return make_spec(tiny_model, {"source": str(pairs_file), "format": "input-output", **data})

    return make


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(make_spec(tiny_model, {"source": "x", "format": "ptt"}))


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_it_holds_what_tokenising_each_row_gives(pairs, pairs_file, tokenizer, tmp_path):
    spec = pairs(validation_rows=6)
    corpus = Corpus(ensure_store(spec, tokenizer, tmp_path))
    examples = [Example(row["input"], row["output"]) for row in rows_of(pairs_file)]
    template = template_of(spec.data.datasets[0])
    expected = tokenize(examples, tokenizer, spec.data, template=template, learn="answer")
    train, held_out = split(len(examples), held_out=6, seed=42)
    found = [corpus.documents(i)[0] for i in range(corpus.num_sequences)]
    for numbers, samples in ((train, found), (held_out, corpus.validation)):
        assert len(numbers) == len(samples)
        for number, sample in zip(numbers, samples, strict=True):
            assert sample.ids.tolist() == expected[number].ids.tolist()
            assert sample.learned.tolist() == expected[number].learned.tolist()
    assert corpus.lengths.tolist() == [len(sample.ids) for sample in found]
    assert corpus.targets.tolist() == [sample.num_targets for sample in found]


@pytest.mark.parametrize(("count", "held_out", "seed"), [(40, 6, 42), (1000, 999, 7), (3, 1, 0)])
def test_the_split_is_that_of_datasets(count, held_out, seed):
    from datasets import Dataset

    parts = Dataset.from_dict({"index": range(count)}).train_test_split(
        test_size=held_out, shuffle=True, seed=seed
    )
    train, validation = split(count, held_out=held_out, seed=seed)
    assert train.tolist() == parts["train"]["index"]
    assert validation.tolist() == parts["test"]["index"]


def test_a_second_run_opens_what_the_first_made(pairs, tokenizer, tmp_path, monkeypatch):
    spec = pairs()
    assert notes.read(spec, tmp_path) is None
    first = ensure_store(spec, tokenizer, tmp_path)
    monkeypatch.setattr(build, "tokenize", None)
    assert ensure_store(spec, tokenizer, tmp_path).sha256 == first.sha256
    assert notes.read(spec, tmp_path) == first.path


def test_whatever_decides_the_tokens_is_in_the_name(pairs, pairs_file, tokenizer, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(pairs_file.read_text() + '{"input": "one", "output": "more"}\n')
    names = [
        fingerprint(pairs(**data), tokenizer)
        for data in (
            {},
            {"source": str(other)},
            {"max_tokens": 63},
            {"template": "Q: {source}"},
            {"learn": "all"},
            {"packing": True},
            {"validation_rows": 3},
        )
    ]
    assert len(set(names)) == len(names)
    copy = tmp_path / "copy.jsonl"
    copy.write_text(pairs_file.read_text())
    assert fingerprint(pairs(source=str(copy)), tokenizer) == names[0]


def test_a_damaged_store_is_found_and_made_anew(pairs, tokenizer, tmp_path):
    spec = pairs(packing=True)
    good = ensure_store(spec, tokenizer, tmp_path)
    told = json.loads((good.path / "corpus.json").read_text())
    told["manifest"]["facts"]["num_rows"] += 1
    (good.path / "corpus.json").write_text(json.dumps(told))
    said: list[str] = []
    assert ensure_store(spec, tokenizer, tmp_path, say=said.append).sha256 == good.sha256
    assert "was changed after it was written" in said[0]
    for name in ("corpus.json", "tokens.bin", "pack_members.bin"):
        file = good.path / name
        for damage in (b"", file.read_bytes()[:-1] + b"\x07", None):
            if damage is None:
                file.unlink()
            else:
                file.write_bytes(damage)
            said = []
            store = ensure_store(spec, tokenizer, tmp_path, say=said.append)
            assert store.sha256 == good.sha256
            assert "tokenising again" in said[0]


def test_work_that_is_broken_off_leaves_nothing(pairs, tokenizer, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_store(pairs(), tokenizer, tmp_path, on_rows=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_builder_left_is_cleared_away(pairs, tokenizer, tmp_path):
    spec = pairs()
    name = fingerprint(spec, tokenizer)
    gone, alive = tmp_path / f"{name}.partial-here-1", tmp_path / f"{name}.partial-there-2"
    for folder, host in ((gone, None), (alive, "another-host")):
        folder.mkdir()
        owner = {"host": host, "boot_id": "x", "pid": 1, "start_ticks": 1}
        if host is None:
            import platform

            owner["host"] = platform.node()
        (folder / "owner.json").write_text(json.dumps(owner))
    ensure_store(spec, tokenizer, tmp_path)
    assert not gone.exists()
    assert alive.exists()


def test_a_mix_repeats_by_weight_and_keeps_each_datasets_format(
    tiny_model, pairs_file, tokenizer, tmp_path
):
    lines = tmp_path / "ptt.txt"
    lines.write_text("問\t答\n好嗎\t好\n", encoding="utf-8")
    mix = [
        {"source": str(pairs_file), "format": "input-output"},
        {"source": str(lines), "format": "ptt", "weight": 3},
    ]
    corpus = Corpus(ensure_store(make_spec(tiny_model, {"mix": mix}), tokenizer, tmp_path))
    assert corpus.num_samples == 40 + 3 * 2
    counts = np.unique(corpus.store.arrays["train"], return_counts=True)[1]
    assert counts.tolist() == [1] * 40 + [3, 3]
    last = tokenizer.decode(corpus.documents(45)[0].ids)
    assert "好" in last


def test_packed_sequences_hold_every_sample_once(pairs, tokenizer, tmp_path):
    spec = pairs(packing=True, validation_rows=4)
    corpus = Corpus(ensure_store(spec, tokenizer, tmp_path))
    plain = Corpus(ensure_store(pairs(validation_rows=4), tokenizer, tmp_path))
    packs = [corpus.documents(i) for i in range(corpus.num_sequences)]
    assert corpus.num_sequences < plain.num_sequences == corpus.num_samples == 36
    assert corpus.lengths.tolist() == [sum(len(s.ids) for s in pack) for pack in packs]
    assert corpus.targets.tolist() == [sum(s.num_targets for s in pack) for pack in packs]
    assert corpus.lengths.max() <= 64

    def bag(samples):
        return sorted(tuple(sample.ids.tolist()) for sample in samples)

    singles = [plain.documents(i)[0] for i in range(plain.num_sequences)]
    assert bag(s for pack in packs for s in pack) == bag(singles)
    assert len(corpus.validation) == 4


def test_the_useful_part_is_counted_over_the_batches_that_will_come(
    tiny_model, pairs_file, tokenizer, tmp_path
):
    data = {"source": str(pairs_file), "format": "input-output"}
    shares = {}
    for grouped in (False, True):
        spec = make_spec(
            tiny_model,
            {**data, "group_by_length": grouped},
            batch={"global_size": 8, "micro_size": 4},
        )
        corpus = Corpus(ensure_store(spec, tokenizer, tmp_path))
        order = make_schedule(spec, corpus).samples(0, 40)
        padded = sum(4 * max(corpus.lengths[order[i : i + 4]]) for i in range(0, 40, 4))
        shares[grouped] = corpus_facts(spec, corpus).useful
        assert shares[grouped] == pytest.approx(corpus.lengths.sum() / padded)
    assert shares[True] > shares[False]


def test_too_few_rows_to_hold_out(pairs, tokenizer, tmp_path):
    with pytest.raises(DataError, match="use at most 39"):
        ensure_store(pairs(validation_rows=40), tokenizer, tmp_path)
