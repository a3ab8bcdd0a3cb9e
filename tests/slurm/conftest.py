"""A real Slurm, one for all tests of this folder, and what they do with it."""

import os
import time
from dataclasses import replace

import pytest

from qlora_testbed import Settings, Testbed
from qlora_testbed_needs import refusal


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
