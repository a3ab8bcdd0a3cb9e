"""What of a checkout or an installation becomes a run's code, and what of it is noticed."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from qlora_dist import code_tree
from qlora_dist.code_tree import check_code, file_hashes, other_code, recorded, tree_sha256
from qlora_dist.errors import PlanError, RunDirError
from qlora_dist.layout import RunDir
from qlora_dist.plan import make_plan
from qlora_dist.spec_file import spec_from_tree
from qlora_launch import code_snapshot
from qlora_launch.code_snapshot import MAX_BYTES, current_code, take_code, write_code
from qlora_launch.render import render
from qlora_slurm.script import Job, batch_script
from tests.unit.test_spec import GOOD

KEY = "hf" + "_AbCdEfGhIjKlMnOp"


def git(folder, *args):
    # Whoever runs the tests may sign commits, or run them in a hook.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    me = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    done = subprocess.run(
        ["git", *me, *args], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with a small package in it, committed."""
    root = tmp_path / "a 'checkout'"
    package = root / "qlora_dist"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "plan.py").write_text("A = 1\n")
    (package / "data" / "tokens.py").write_text("B = 1\n")
    (package / "data" / "tokenizer.py").write_text("")
    (package / "old.py").write_text(f"KEY = '{KEY}'\n")
    (root / "README.md").write_text("")
    (root / ".gitignore").write_text("*.log\n__pycache__/\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=first")
    return package


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir(mode=0o700)
    return RunDir(tmp_path / "run")


CLEAN = {
    *("qlora_dist/__init__.py", "qlora_dist/plan.py"),
    *("qlora_dist/data/tokens.py", "qlora_dist/data/tokenizer.py"),
}


def test_a_clean_checkout_is_its_commit(checkout, run):
    (checkout / "old.py").write_text("")
    git(checkout, "commit", "--quiet", "--all", "--message=second")
    code = current_code(checkout)
    assert set(code.files) == CLEAN | {"qlora_dist/old.py"}
    assert code.commit == git(checkout, "rev-parse", "HEAD")
    assert (code.dirty, code.diff, code.left_out) == (False, "", {})
    write_code(code, run.root)
    assert not run.code_diff.exists()
    tree = recorded(run)
    assert tree["files"] == file_hashes(run.code)
    assert tree["sha256"] == tree_sha256(tree["files"])
    assert "numpy" in tree["packages"]
    for path in (run.code, *run.code.rglob("*"), run.code_json):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)


def test_what_is_not_committed_is_taken_and_what_is_ignored_secret_or_huge_is_not(
    checkout, run, tmp_path, monkeypatch
):
    (tmp_path / "outside.py").write_text("C = 1\n")
    (checkout / "plan.py").write_text("A = 2\n")
    (checkout / "old.py").unlink()
    (checkout / "new [1].py").write_text("D = 1\n")
    (checkout / "trace.log").write_text("ignored")
    (checkout / "linked.py").symlink_to("plan.py")
    (checkout / "outside.py").symlink_to(tmp_path / "outside.py")
    (checkout / "everything").symlink_to("/")
    (checkout / "nowhere.py").symlink_to("gone.py")
    (checkout / "core").write_bytes(b"\0" * (MAX_BYTES + 1))
    (checkout / "notes.md").write_text(f"my key is {KEY}\n")
    (checkout / "line\nbreak.py").write_text("")
    for name in (".env", "cert.pem", "id_rsa", "Server.KEY", "secrets.json", "hub_token"):
        (checkout / name).write_text("x")
    (checkout / "innocent.py").symlink_to(".env")
    code = current_code(checkout)
    assert set(code.files) == CLEAN | {"qlora_dist/new [1].py", "qlora_dist/linked.py"}
    assert code.files["qlora_dist/linked.py"] == b"A = 2\n"
    assert set(code.left_out) == {
        f"qlora_dist/{name}"
        for name in (
            *("outside.py", "everything", "nowhere.py", "core", "notes.md", "line\nbreak.py"),
            *(".env", "cert.pem", "id_rsa", "Server.KEY", "secrets.json", "hub_token"),
            "innocent.py",
        )
    }
    assert code.dirty
    assert "-A = 1\n+A = 2" in code.diff
    assert "deleted file" in code.diff
    assert KEY not in code.diff
    said = []
    use(monkeypatch, code)
    take_code(run, say=said.append)
    assert "code: left out qlora_dist/core: larger than 4 MiB" in said
    assert not any("\n" in line for line in said)
    assert not any(path.is_symlink() for path in run.code.rglob("*"))
    assert not any(KEY.encode() in p.read_bytes() for p in run.root.rglob("*") if p.is_file())


def test_a_new_file_alone_makes_a_checkout_dirty(checkout):
    assert current_code(checkout).dirty is False
    (checkout / "new.py").write_text("")
    assert current_code(checkout).dirty is True


@pytest.mark.parametrize("where", ["no repository", "ignored in one", "no git"])
def test_an_installed_package_is_taken_from_where_it_lies(checkout, monkeypatch, tmp_path, where):
    package = tmp_path / "site-packages" / "qlora_dist"
    if where == "ignored in one":
        package = checkout.parent / ".venv" / "qlora_dist"
        (checkout.parent / ".gitignore").write_text(".venv/\n")
    shutil.copytree(checkout, package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "plan.cpython-311.pyc").write_bytes(b"x")
    (package / ".env").write_text("x")
    (package / "old.py").unlink()
    if where == "no git":
        package = checkout
        (package / "old.py").unlink()
        (package / ".env").write_text("x")
        monkeypatch.setenv("PATH", "/nowhere")
    code = current_code(package)
    assert set(code.files) == CLEAN
    assert set(code.left_out) == {"qlora_dist/.env"}
    assert (code.commit, code.dirty, code.diff) == (None, None, "")


def test_a_hooks_variables_name_no_other_repository(checkout, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert current_code(checkout).commit is not None


def test_our_own_package_is_whole():
    """Nothing of ours looks like a secret."""
    code = current_code()
    assert code.left_out == {}
    assert "qlora_dist/train/worker.py" in code.files


def use(monkeypatch, code):
    monkeypatch.setattr(code_snapshot, "current_code", lambda: code)


def test_code_is_taken_anew_only_if_it_differs(checkout, run, monkeypatch):
    (checkout / "old.py").write_text("")
    git(checkout, "commit", "--quiet", "--all", "--message=second")
    said = []
    first = current_code(checkout)
    use(monkeypatch, first)
    take_code(run, say=said.append)
    assert said[0].startswith("code: was unknown, is ")
    said.clear()
    inode = run.code.stat().st_ino
    take_code(run, say=said.append)
    # Committed since: the same code.
    use(monkeypatch, replace(first, commit="f" * 40))
    take_code(run, say=said.append)
    assert said == []
    assert run.code.stat().st_ino == inode
    assert recorded(run)["commit"] == "f" * 40
    (checkout / "plan.py").write_text("A = 3\n")
    use(monkeypatch, current_code(checkout))
    take_code(run, say=said.append)
    before, now = "f" * 12, first.commit[:12]
    assert said[0].startswith(f"code: was {before} (sha256 ")
    assert f"), is {now} with changes (sha256 " in said[0]
    assert (run.code / "qlora_dist" / "plan.py").read_text() == "A = 3\n"
    assert "+A = 3" in run.code_diff.read_text()
    assert {path.name for path in run.root.iterdir()} == {
        *("code", "code.json", "code.diff", "control")
    }


def test_a_crash_while_code_is_replaced_leaves_a_run_that_takes_it_anew(checkout, run, monkeypatch):
    use(monkeypatch, current_code(checkout))
    take_code(run, say=lambda _: None)
    (checkout / "plan.py").write_text("A = 3\n")
    code = current_code(checkout)

    def crash(*_):
        raise KeyboardInterrupt

    use(monkeypatch, code)
    for name in ("replace_dir", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(code_snapshot, name, crash)
            with pytest.raises(KeyboardInterrupt):
                take_code(run, say=lambda _: None)
        assert recorded(run) is None
    take_code(run, say=lambda _: None)
    assert recorded(run)["files"] == file_hashes(run.code) == code.to_json()["files"]


def test_code_is_not_taken_while_a_launcher_has_the_run(checkout, run, monkeypatch):
    from qlora_dist.attempt import own

    use(monkeypatch, current_code(checkout))
    take_code(run, say=lambda _: None)
    (checkout / "plan.py").write_text("A = 3\n")
    with own(run) as attempt:
        noted = json.loads((run.attempt(attempt) / "attempt.json").read_text())
        assert noted["code"] == recorded(run)["sha256"]
        use(monkeypatch, current_code(checkout))
        with pytest.raises(RunDirError, match="already being run"):
            take_code(run, say=lambda _: None)


def edit(run):
    (run.code / "qlora_dist" / "plan.py").write_text("A = 9\n")


def add_module(run):
    (run.code / "torch.py").write_text("")


def remove(run):
    (run.code / "qlora_dist" / "plan.py").unlink()


def add_link(run):
    (run.code / "torch").symlink_to("/tmp")


def edit_with_its_hash(run):
    edit(run)
    tree = recorded(run)
    tree["files"] = file_hashes(run.code)
    run.code_json.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (edit, "qlora_dist/plan.py is edited"),
        (add_module, "torch.py is new"),
        (remove, "qlora_dist/plan.py is missing"),
        (add_link, "torch is new"),
        (edit_with_its_hash, "its sha256"),
        (lambda run: run.code_json.unlink(), "cannot be read"),
        (lambda run: run.code_json.write_text("[]"), "cannot be read"),
    ],
)
def test_a_process_refuses_code_that_is_not_what_was_taken(
    checkout, run, monkeypatch, tamper, message
):
    write_code(current_code(checkout), run.root)
    monkeypatch.setattr(code_tree, "package_dir", lambda: run.code / "qlora_dist")
    (run.code / "qlora_dist" / "__pycache__").mkdir()
    (run.code / "qlora_dist" / "__pycache__" / "plan.pyc").write_bytes(b"")
    check_code(run)
    tamper(run)
    with pytest.raises(RunDirError) as error:
        check_code(run)
    assert message in str(error.value)
    assert "qlora resume" in str(error.value)


def test_a_process_refuses_to_run_from_elsewhere(checkout, run, monkeypatch):
    write_code(current_code(checkout), run.root)
    with pytest.raises(RunDirError, match="this process has its code from"):
        check_code(run)
    # One that the user has started may; it says so where that makes a difference.
    monkeypatch.setattr(code_tree, "package_dir", lambda: checkout)
    assert "old.py is new" in other_code(run)
    (checkout / "old.py").unlink()
    assert other_code(run) is None
    (checkout / "plan.py").write_text("A = 4\n")
    assert "qlora_dist/plan.py is edited" in other_code(run)


def test_a_name_that_pythonpath_cannot_hold_is_refused_with_one_that_works(tmp_path):
    spec = spec_from_tree(GOOD, [f"run_dir={tmp_path}/a:b"])
    with pytest.raises(PlanError, match="/a-b'"):
        render(make_plan(spec))


@pytest.mark.parametrize(
    "name", ["plain", "with space", "q'uote", 'd"q', "$(touch hacked)", "中文"]
)
def test_a_job_submitted_from_a_checkout_runs_the_runs_own_code(tmp_path, name):
    """The current folder of ``python -m`` comes before PYTHONPATH, if nothing is done about it."""
    run = RunDir(tmp_path / name)
    for folder, says in ((tmp_path / "checkout", "checkout"), (run.code, "snapshot")):
        (folder / "qlora_dist").mkdir(parents=True)
        (folder / "qlora_dist" / "__init__.py").write_text("")
        (folder / "qlora_dist" / "batch.py").write_text(
            f"import sys, os\nprint({says!r}, os.environ['PYTHONPATH'], sys.argv[2], sep='\\n')"
        )
    profile = tmp_path / "site.yaml"
    profile.write_text("setup: ['export PYTHONPATH=/site']\n")
    resources = {"backend": "slurm", "gpus_per_node": 1, "profile": str(profile)}
    spec = spec_from_tree({**GOOD, "run_dir": str(run.root), "resources": resources})
    script = batch_script(Job(make_plan(spec), run.root, (run.root,)))
    done = subprocess.run(
        ["bash"],
        input=script,
        cwd=tmp_path / "checkout",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "checkout")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["snapshot", f"{run.code}:/site", str(run.root)]
    assert sys.executable in script
    assert not (tmp_path / "checkout" / "hacked").exists()
