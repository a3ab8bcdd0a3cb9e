"""A real Slurm, one for all tests of this folder, and what they do with it."""

import json
import os
import time
from dataclasses import replace

import pytest

from qlora_dist.layout import RunDir, open_run
from qlora_dist.ledger import standing
from qlora_dist.train.compare import records
from qlora_testbed import Settings, Testbed
from qlora_testbed_needs import refusal
from tests.conftest import run_qlora, write_config

# Steps of about a quarter of a second, long enough to be hit by something.
SLOW = {
    "batch__global_size": 32,
    "batch__micro_size": 1,
    "schedule__steps": 60,
    "checkpoint__every_steps": 20,
    "evaluation__every_steps": 50,
}
RESOURCES = {
    "backend": "slurm",
    "nodes": 2,
    "gpus_per_node": 0,
    "processes_per_node": 1,
    "cpus_per_process": 1,
    "time": "0:10:00",
}


def need(folder, settings):
    """Skip where there can be no testbed; fail where CI promises that there can."""
    reason = refusal(Testbed(folder, settings).place, settings)
    if reason and os.environ.get("CI") == "true":
        pytest.fail(f"no Slurm on a machine of CI: {reason}")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def testbed(tmp_path_factory):
    """Two nodes, no accounting. Whatever a test changes in it, it puts back."""
    folder = tmp_path_factory.mktemp("slurm") / "a 'testbed' with \"quotes\""
    settings = Settings()
    need(folder, settings)
    with Testbed(folder, settings) as up:
        yield up
    assert not up.processes()
    assert not up.alive()


@pytest.fixture
def changed(testbed):
    """Give the testbed other settings until the test has ended."""
    before = testbed.settings

    def change(**changes):
        testbed.reconfigure(replace(before, **changes))

    yield change
    if testbed.settings != before:
        testbed.reconfigure(before)


@pytest.fixture
def make(tmp_path):
    """Make testbeds of the test's own, not up yet; taken down at the end."""
    made = []

    def go(settings=None, name="own"):
        settings = settings or Settings()
        need(tmp_path / name, settings)
        made.append(Testbed(tmp_path / name, settings))
        return made[-1]

    yield go
    for testbed in made:
        # Read anew: another process may have brought it up.
        Testbed(testbed.place.folder).down()


class Job:
    """A batch job on a testbed."""

    def __init__(self, testbed, folder, script, *options):
        path = folder / f"job-{time.monotonic_ns()}.sh"
        path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        self.testbed = testbed
        self.output = path.with_suffix(".out")
        # Without --mem a job takes all of a node's memory, and no other has room beside it.
        self.id = testbed.run(
            *("sbatch", "--parsable", "--mem=100", "--open-mode=append"),
            *(f"--output={self.output}", f"--chdir={folder}", *options, str(path)),
        ).strip()

    def field(self, name):
        """A field of ``scontrol show job``."""
        line = self.testbed.run("scontrol", "show", "job", "--oneliner", self.id)
        return dict(word.partition("=")[::2] for word in line.split())[name]

    def wait_for(self, state, *, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while (now := self.field("JobState")) != state:
            assert time.monotonic() < deadline, f"job {self.id}: {now}, not {state}"
            time.sleep(0.1)

    def wait_for_line(self, line, *, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while line not in self.lines():
            assert time.monotonic() < deadline, self.lines()
            time.sleep(0.05)

    def lines(self):
        return self.output.read_text().splitlines() if self.output.exists() else []


@pytest.fixture
def submit(tmp_path):
    """Submit a script, with options of sbatch; its jobs are cancelled at the end."""
    jobs = []

    def go(testbed, script, *options):
        jobs.append(Job(testbed, tmp_path, script, *options))
        return jobs[-1]

    yield go
    for job in jobs:
        if job.testbed.alive():
            job.testbed.run("scancel", "--quiet", job.id)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, tiny_model, pairs_file):
    """The same run on this machine, unbroken."""
    folder = tmp_path_factory.mktemp("whole")
    run_qlora(folder, "run", write_config(folder, tiny_model, pairs_file, "whole", SLOW))
    return RunDir(folder / "whole")


@pytest.fixture
def slurm(testbed, tmp_path, tiny_model, pairs_file, monkeypatch):
    """Submit a run of two nodes, one process each; keyword arguments change its config."""
    for name, value in testbed.env.items():
        monkeypatch.setenv(name, value)
    profile = tmp_path / "site.yaml"

    def submit(name="run", *, code=0, site=None, verb=("submit",), **changes):
        lines = {"partition": "low", "mem_gb": 1, "signal_lead_s": 30, **(site or {})}
        profile.write_text(json.dumps(lines))
        changes = SLOW | {
            "resources": RESOURCES | {"profile": str(profile)},
            **changes,
        }
        config = write_config(tmp_path, tiny_model, pairs_file, name, changes)
        done = run_qlora(tmp_path, *verb, config, code=code)
        return RunDir(tmp_path / name), done

    yield submit
    testbed.run("scancel", "--user=root")
    testbed.wait_idle()
    assert testbed.processes() == []


def wait_until(condition, timeout_s=180):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def steps(run):
    return sum(kind == "train" for kind, _ in records(run)) if run.metrics.exists() else 0


def state(run):
    return standing(*open_run(run.root)).state


def said(run):
    """Everything that the job printed, for a test that fails."""
    files = [*run.control.glob("slurm-*.out"), *run.attempts.glob("*/logs/*")]
    return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-1500:]}" for file in files)
