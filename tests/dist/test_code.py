"""A run executes the code that was taken for it, and sees of the environment what it may."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from qlora_dist.layout import RunDir
from tests.conftest import run_qlora

SMALL = {
    "schedule__steps": 2,
    "schedule__warmup_steps": 1,
    "strategy__kind": "single",
    "resources__processes_per_node": 1,
    "evaluation__every_steps": None,
}
# What a job does when Slurm starts it again.
NEXT_ATTEMPT = """
import sys
from pathlib import Path
from qlora_dist.job import ranks_here, run_attempt
from qlora_dist.layout import RunDir

end = run_attempt(RunDir(Path(sys.argv[1])), ranks_here, say=print, bar=False)
print(end.cause)
sys.exit(end.code)
"""
SAYS, SAYS_OTHER = 'log.say(f"ready after {clock}")', 'log.say(f"another ready after {clock}")'


def edit(checkout, old, new):
    path = checkout / "qlora_dist" / "train" / "stages.py"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def python(cwd, *arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def noted_code(run, attempt):
    return json.loads((run.attempt(attempt) / "attempt.json").read_text())["code"]


def test_a_run_that_waits_executes_its_own_code_until_the_user_resumes_it(config, checkout):
    path = config("waiting", **SMALL)
    run = RunDir(path.with_suffix(""))
    run_qlora(checkout, "run", path, "--prepare")
    edit(checkout, SAYS, SAYS_OTHER)
    python(checkout, "-c", NEXT_ATTEMPT, run.root)
    assert "another ready" not in run.run_log(0).read_text()
    assert "ready after" in run.run_log(0).read_text()
    done = run_qlora(checkout, "resume", run.root)
    assert "code: was qlora-dist" in done.stdout
    assert "another ready after" in run.run_log(1).read_text()
    assert noted_code(run, 0) != noted_code(run, 1)


def test_a_run_whose_code_was_tampered_with_is_refused(config, qlora):
    path = config("tampered", **SMALL)
    run = RunDir(path.with_suffix(""))
    qlora("run", path, "--prepare")
    with (run.code / "qlora_dist" / "train" / "stages.py").open("a") as file:
        file.write("raise SystemExit(0)\n")
    done = qlora("resume", run.root, code=2)
    assert "qlora_dist/train/stages.py is edited" in done.stderr
    assert f"rm -r {run.code}" in done.stderr
    shutil.rmtree(run.code)
    assert "code: was" in qlora("resume", run.root).stdout


def test_a_process_started_by_hand_says_that_its_code_is_another(config, checkout):
    path = config("by-hand", **SMALL)
    run = RunDir(path.with_suffix(""))
    run_qlora(checkout, "run", path, "--prepare")
    before = json.loads(run.code_json.read_text())["sha256"]
    edit(checkout, SAYS, SAYS_OTHER)
    done = python(checkout, "-m", "qlora_dist.train.worker", run.root)
    assert "which is not the run's: qlora_dist/train/stages.py is edited" in done.stderr
    assert "another ready after" in run.run_log(0).read_text()
    assert noted_code(run, 0) != before


def test_a_secret_of_the_shell_reaches_neither_a_process_nor_a_file(
    config, qlora, start, monkeypatch
):
    secrets = {
        "HF_TOKEN": "hf" + "_AbCdEfGhIjKlMnOp",
        "WANDB_API_KEY": "0123456789abcdef",
        "QLORA_PASSWORD": "correct horse",
        "LAB_NOTES": "battery staple",
    }
    wanted = {
        "https_proxy": "http://me:pass@word@localhost:1",
        "NCCL_DEBUG": "WARN",
        "LAB_QUEUE": "a b",
    }
    for name, value in (secrets | wanted).items():
        monkeypatch.setenv(name, value)
    path = config("secretive", resources__pass_env=["LAB_Q*", "HF_*"])
    run = RunDir(path.with_suffix(""))
    qlora("run", path, "--prepare")
    process = start("resume", run.root, count=2)
    ranks = [json.loads(run.rank_file(0, rank).read_text())["process"]["pid"] for rank in (0, 1)]
    for pid in (*ranks, parent(ranks[0])):
        environ = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        got = dict(line.partition("=")[::2] for line in environ if line)
        assert not set(secrets) & set(got)
        assert wanted.items() <= got.items()
        assert got["PYTHONPATH"].split(os.pathsep)[0] == str(run.code)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    for value in (*secrets.values(), "pass@word", "word@localhost"):
        found = [p for p in run.root.rglob("*") if p.is_file() and value.encode() in p.read_bytes()]
        assert found == []
        assert value not in output
    noted = json.loads(run.environment_json(0).read_text())
    assert set(secrets) <= set(noted["left_out"])
    assert noted["variables"]["https_proxy"] == "http://<redacted>@localhost:1"
    assert noted["variables"]["LAB_QUEUE"] == "a b"


def parent(pid):
    """The process that started another: torchrun."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
