"""A prefetched run needs no network and uses what was fetched; against a stand-in for the hub."""

import hashlib
import json
import random

import pytest
from safetensors.numpy import load_file, save

from qlora_dist.errors import ModelError
from qlora_launch import progress
from qlora_launch.hub_cache import model_files
from tests.conftest import run_qlora, write_config
from tests.hub_stand_in import HubStandIn

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_positions": 256,
}
CARD = b"""---
configs:
- config_name: other
  data_files: other/*.jsonl
- config_name: pairs
  default: true
  data_files:
  - {split: train, path: data/train.jsonl}
  - {split: test, path: data/test.jsonl}
---
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def sharded(tiny_model):
    """Files of the tiny model in two shards, and what a run must leave alone."""
    tensors = load_file(tiny_model / "model.safetensors")
    names = sorted(tensors)
    parts = {FIRST: names[::2], SECOND: names[1::2]}
    files = {
        path.name: path.read_bytes() for path in tiny_model.iterdir() if path.suffix == ".json"
    }
    for file, part in parts.items():
        files[file] = save({name: tensors[name] for name in part}, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    unread = ("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "evil.py")
    return files | {name: b"not to be fetched" for name in unread}


def rows(word, count=20):
    lines = [json.dumps({"input": f"q {i}", "output": f"{word} {i}"}) + "\n" for i in range(count)]
    return "".join(lines).encode()


def dataset_files(word):
    data = {f"{name}.jsonl": rows(word) for name in ("data/train", "data/test", "other/train")}
    return {"README.md": CARD, **data}


class Place:
    """A folder with a config, a cache of its own, and the hub."""

    def __init__(self, folder, hub):
        self.folder, self.hub = folder, hub
        self.env = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.url}

    def config(self, name="run", **changes):
        changes = {
            "model__shape": SHAPE,
            "strategy__kind": "single",
            "resources__processes_per_node": 1,
            "schedule__steps": 3,
        } | changes
        return write_config(self.folder, "org/tiny", "org/rows", name, changes)

    def qlora(self, *arguments, code=0, **env):
        return run_qlora(self.folder, *arguments, code=code, env=self.env | env)

    def spec(self, name="run"):
        return json.loads((self.folder / name / "run.json").read_text())["spec"]

    def in_cache(self, pattern):
        return sorted(path.name for path in (self.folder / "hf" / "hub").glob(pattern))


@pytest.fixture
def hub():
    server = HubStandIn()
    yield server
    server.stop()


@pytest.fixture
def place(tmp_path, hub, sharded):
    hub.model("org/tiny").commit(sharded)
    hub.dataset("org/rows").commit(dataset_files("apple"))
    return Place(tmp_path, hub)


def test_a_prefetched_run_needs_no_network(place, sharded):
    config = place.config()
    said = place.qlora("prefetch", config).stdout
    model, data = (place.hub.repos[key].refs["main"] for key in place.hub.repos)
    assert "to fetch: 7 files" in said
    assert [line.split()[:2] for line in said.splitlines()[-2:]] == [
        ["org/tiny", model],
        ["org/rows", data],
    ]
    there = place.in_cache(f"models--org--tiny/snapshots/{model}/**/*")
    assert there == sorted(name for name in sharded if sharded[name] != b"not to be fetched")
    assert place.hub.downloads("other/train.jsonl") == []

    place.hub.stop()
    assert "apple 1" in place.qlora("data", config, "--show", "20", **OFFLINE).stdout
    again = place.qlora("prefetch", config)
    assert [line.split()[1] for line in again.stdout.splitlines()] == ["commit", model, data]
    place.qlora("run", config, **OFFLINE)
    spec = place.spec()
    assert (spec["model"]["revision"], spec["data"]["revision"]) == (model, data)


def test_the_pinned_rows_are_read_and_not_the_ones_fetched_last(place):
    config, repo = place.config(), place.hub.dataset("org/rows")
    old = repo.refs["main"]
    place.qlora("prefetch", config)
    repo.commit(dataset_files("pear"))
    place.qlora("prefetch", config)
    place.qlora("prefetch", config, "data.subset=other")
    place.hub.stop()

    newest = place.qlora("data", config, "--show", "20", **OFFLINE).stdout
    assert "pear 1" in newest
    assert "apple 1" not in newest
    pinned = place.qlora("data", config, f"data.revision={old}", "--show", "20", **OFFLINE).stdout
    assert "apple 1" in pinned
    missing = place.qlora(
        "data", config, f"data.revision={old}", "data.subset=other", code=2, **OFFLINE
    )
    assert "qlora prefetch CONFIG" in missing.stderr


def test_a_run_keeps_its_commits_when_the_branch_moves(place, sharded):
    config, repo = place.config(), place.hub.model("org/tiny")
    old = repo.refs["main"]
    place.qlora("run", config, "--prepare")
    assert place.spec()["model"]["revision"] == old
    (place.folder / "run" / "checkpoints" / "step_000001").mkdir(parents=True)

    new = repo.commit(sharded | {"extra.json": b"{}"})
    place.qlora("prefetch", config, "run_dir=elsewhere")
    place.qlora("run", config, "--prepare")
    assert place.spec()["model"]["revision"] == old
    place.qlora("run", config, "--prepare", "run_dir=elsewhere")
    assert place.spec("elsewhere")["model"]["revision"] == new
    refused = place.qlora("run", config, "--prepare", f"model.revision={new}", code=2).stderr
    assert f"model.revision: was '{old}', is '{new}'" in refused


def test_a_run_is_pinned_without_the_hub_where_the_cache_knows_and_else_stays_as_it_is(place):
    config = place.config(model__revision="main")
    place.hub.stop()
    place.qlora("run", config, "--prepare")
    assert place.spec()["model"]["revision"] == "main"
    assert place.spec()["data"]["revision"] is None

    refs = place.folder / "hf" / "hub" / "models--org--tiny" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("1" * 40)
    place.qlora("run", config, "--prepare")
    assert place.spec()["model"]["revision"] == "1" * 40


def test_a_dataset_that_takes_the_place_of_another_has_a_commit_of_its_own(place):
    config = place.config()
    place.qlora("run", config, "--prepare")
    other = place.hub.dataset("org/mirror").commit(dataset_files("pear"))
    run, mirror = place.folder / "run", "data.source=org/mirror"
    refused = place.qlora("resume", run, mirror, "resources.backend=slurm", code=2).stderr
    assert f"qlora prefetch {run} {mirror}\n" in refused
    place.qlora("prefetch", run, mirror)
    shown = place.qlora("resume", run, mirror, "--dry-run")
    assert f'"revision": "{other}"' in shown.stdout
    assert f'"revision": "{place.spec()["data"]["revision"]}"' not in shown.stdout


def test_a_job_has_all_in_the_cache_or_is_refused(place):
    config = place.config(resources__backend="slurm")
    refused = place.qlora("run", config, "--prepare", code=2).stderr
    assert "model.source: org/tiny at " in refused
    assert "data.source: org/rows at " in refused
    assert f"qlora prefetch {config}" in refused
    assert not (place.folder / "run").exists()

    place.qlora("prefetch", config)
    place.qlora("run", config, "--prepare")
    assert not place.in_cache("**/evil.py")
    env = json.loads((place.folder / "run" / "command.json").read_text())["env"]
    assert OFFLINE.items() <= env.items()

    shard = next((place.folder / "hf/hub/models--org--tiny/snapshots").glob(f"*/{SECOND}"))
    shard.resolve().unlink()
    refused = place.qlora("resume", place.folder / "run", code=2).stderr
    assert f"qlora prefetch {place.folder / 'run'}" in refused
    assert "data.source" not in refused
    place.qlora("prefetch", place.folder / "run")
    assert shard.is_file()


def test_a_plan_and_a_dry_run_ask_no_hub(place):
    config = place.config(resources__backend="slurm")
    place.qlora("plan", config)
    shown = place.qlora("run", config, "--dry-run").stdout
    assert '"HF_HUB_OFFLINE": "1"' in shown
    assert place.hub.log == []


def test_a_local_run_has_its_network_and_local_paths_are_said(place, tiny_model, pairs_file):
    config = write_config(place.folder, tiny_model, pairs_file, "local", {})
    said = place.qlora("prefetch", config).stdout
    assert said.count("is on this machine; nothing to fetch") == 2
    place.qlora("run", config, "--prepare")
    env = json.loads((place.folder / "local" / "command.json").read_text())["env"]
    assert not OFFLINE.keys() & env.keys()
    assert place.hub.log == []


def test_a_download_that_breaks_goes_on_where_it_broke(place, sharded):
    # huggingface_hub writes pieces of 10 MiB.
    piece, data = 10 * 2**20, random.Random(0).randbytes(23 * 2**20)
    place.hub.model("org/tiny").commit(sharded | {FIRST: data})
    place.hub.faults[FIRST] = [piece + 1000, piece + 2000]
    place.qlora("prefetch", place.config())
    assert place.hub.downloads(FIRST) == [None, f"bytes={piece}-", f"bytes={2 * piece}-"]
    file = next((place.folder / "hf/hub/models--org--tiny/snapshots").glob(f"*/{FIRST}"))
    assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(data).digest()


def test_a_hub_that_fails_for_long_is_given_up_and_the_same_command_goes_on(place):
    place.hub.faults[SECOND] = [503, 503, 503]
    failed = place.qlora("prefetch", place.config(), code=1)
    assert failed.stdout.count("; again in ") == 2
    assert "the same command goes on" in failed.stderr
    place.qlora("prefetch", place.config())
    assert len(place.hub.downloads(FIRST)) == 1
    assert len(place.hub.downloads(SECOND)) == 4


def gate(hub):
    hub.model("org/tiny").gated = True


def gate_rows(hub):
    hub.dataset("org/rows").gated = True


def only_pickles(hub):
    hub.model("org/tiny").commit({"config.json": b"{}", "pytorch_model.bin": b""})


def huge(hub):
    hub.model("org/tiny").claimed[FIRST] = 10**18


@pytest.mark.parametrize(
    ("change", "override", "code", "expected"),
    [
        (gate, "name=x", 2, "'org/tiny' is gated and this account has no access"),
        (gate_rows, "name=x", 2, "https://huggingface.co/datasets/org/rows, put a token"),
        (None, "model.source=org/none", 2, "nor a name on the hub (or it is private"),
        (None, "data.source=org/none", 2, "the dataset 'org/none' is neither"),
        (None, "model.revision=v9", 2, "'org/tiny' has no such revision"),
        (None, "data.subset=none", 2, "BuilderConfig 'none' not found"),
        (None, "data.split=none", 2, 'Unknown split "none"'),
        (None, "data.source=none.jsonl", 2, "there is no file 'none.jsonl'"),
        (only_pickles, "name=x", 2, "only pickles, which can run any code: pytorch_model.bin"),
        (huge, "name=x", 1, "1000000.00 TB are to be fetched, and the disk of"),
        (HubStandIn.stop, "name=x", 1, "the hub cannot be reached"),
    ],
)
def test_what_cannot_be_fetched_is_one_message(place, change, override, code, expected):
    if change is not None:
        change(place.hub)
    failed = place.qlora("prefetch", place.config(), override, code=code)
    assert expected in failed.stderr
    assert failed.stderr.count("qlora: ") == 1
    assert place.hub.downloads("pytorch_model.bin") == []


def test_a_gated_model_is_fetched_with_the_token_file(place):
    place.hub.model("org/tiny").gated = True
    place.hub.tokens.add("hf_secret")
    token = place.folder / "token"
    token.write_text("hf_secret\n")
    token.chmod(0o600)
    config = place.config(model__token_file=str(token))
    done = place.qlora("prefetch", config)
    assert "hf_secret" not in done.stdout + done.stderr
    place.hub.stop()
    place.qlora("run", config, "resources.backend=slurm", "--prepare")


def test_the_files_of_a_model_are_the_ones_that_are_read(tmp_path):
    def files(*names, code=False):
        return model_files(dict.fromkeys(names, 1), tmp_path, source="org/m", code=code)

    both = ("model.safetensors", INDEX, FIRST)
    assert files(*both, "model.bin", "m.py") == ["model.safetensors", INDEX]
    assert files("model.safetensors", "m.py", code=True) == ["model.safetensors", "m.py"]
    chat = ("tokenizer.model", "chat_template.jinja", "additional_chat_templates/x.jinja")
    assert files("model.safetensors", "onnx/config.json", *chat)[1:] == list(chat)

    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}))
    assert files(FIRST, SECOND, "consolidated.safetensors", INDEX) == [FIRST, SECOND, INDEX]
    with pytest.raises(ModelError, match=f"lacks {SECOND}"):
        files(FIRST, INDEX)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ModelError, match="is damaged"):
        files(FIRST, INDEX)


def test_sizes_are_in_the_unit_that_suits_them():
    sizes = (0, 999, 1500, 2 * 10**6, 13_476_839_424, 10**12)
    assert [progress.size_text(size) for size in sizes] == [
        *("0 B", "999 B", "1.50 kB", "2.00 MB", "13.48 GB", "1.00 TB")
    ]


def test_progress_is_one_bar_on_a_terminal_and_a_line_now_and_then_elsewhere(monkeypatch, capfd):
    lines = []
    with progress.DownloadProgress(4_000_000, lines.append, bar=False) as shown:
        bars = [shown.bar_class()(total=9, unit="B", desc=d) for d in ("Download", "Reconstruct")]
        bars[1].update(1)
        assert lines == []
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
        for bar in bars:
            bar.n = 1_500_000
            bar.refresh()
            bar.close()
    assert set(lines) == {"1.50 MB of 4.00 MB"}
    assert capfd.readouterr() == ("", "")
    with progress.DownloadProgress(4_000_000, lines.append, bar=True) as shown:
        shown.update(4_000_000)
    assert "4.00M/4.00M" in capfd.readouterr().err
