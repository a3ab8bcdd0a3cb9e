"""Fixtures that every folder of tests shares: a tiny model, tiny data, and the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from models import make_tiny_model

from qlora_dist.layout import RunDir

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A LLaMA of two layers with random weights and a byte-level tokenizer of 512 tokens."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """40 rows of input and output, of many lengths."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"input": f"Question {i}: " + "what " * (i % 7) + "?", "output": "word " * (1 + i * 5 % 11)}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path, tiny_model, pairs_file):
    """Write a small CPU config; keyword arguments ``section__key=value`` change it."""

    def write(name="run", **changes):
        return write_config(tmp_path, tiny_model, pairs_file, name, changes)

    return write


def write_config(folder, model, data, name, changes):
    spec = {
        "name": name,
        "run_dir": str(folder / name),
        "seed": 7,
        "model": {"source": str(model), "dtype": "fp32", "gradient_checkpointing": False},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "source": str(data),
            "format": "input-output",
            "max_tokens": 64,
            "validation_rows": 6,
        },
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "cosine", "steps": 10, "warmup_steps": 2},
        "batch": {"global_size": 8, "micro_size": 2},
        "strategy": {"kind": "ddp"},
        "resources": {"gpus_per_node": 0, "processes_per_node": 2, "cpus_per_process": 1},
        "checkpoint": {"every_steps": 3},
        "evaluation": {"every_steps": 4, "micro_size": 2},
    }
    if isinstance(data, Path):
        # Tokenised once for all tests.
        spec["data"]["store_dir"] = str(data.parent / "corpora")
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        if inner:
            spec.setdefault(section, {})[inner] = value
        else:
            spec[section] = value
    path = folder / f"{name}.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the project that commands run from, to be edited."""
    copy = tmp_path / "checkout"
    folders = ["qlora_dist", "launch/qlora_launch", "slurm/qlora_slurm"]
    for folder in folders:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = [str((copy / folder).parent) for folder in folders]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    return copy


def qlora_argv(*arguments):
    return [sys.executable, "-m", "qlora_launch.cli", *map(str, arguments)]


def run_qlora(cwd, *arguments, code=0, env=None, stdin=None):
    """Run the command line as a user does; returns the finished process."""
    done = subprocess.run(
        qlora_argv(*arguments),
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
        input=stdin,
        check=False,
    )
    assert done.returncode == code, f"{arguments}: {done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def qlora(tmp_path):
    """The command line, in a folder of the test's own."""
    return partial(run_qlora, tmp_path)


def start_qlora(cwd, *arguments, lines_of, count):
    """Start a command and come back once a file has so many lines."""
    process = subprocess.Popen(
        qlora_argv(*arguments),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while num_lines(lines_of) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def stop_qlora(cwd, *arguments, lines_of, count, number=signal.SIGTERM):
    """Start a command, send it a signal at that line, and return its exit code and output."""
    process = start_qlora(cwd, *arguments, lines_of=lines_of, count=count)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, tiny_model, pairs_file):
    """The small config, run from end to end without a stop. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_config(folder, tiny_model, pairs_file, "whole", {})
    run_qlora(folder, "run", path)
    return RunDir(folder / "whole")


@pytest.fixture(scope="session")
def stopped_run(tmp_path_factory, tiny_model, pairs_file):
    """The same, stopped by a SIGTERM after its second step. Not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    path = write_config(folder, tiny_model, pairs_file, "stopped", {})
    run_qlora(folder, "run", path, "--prepare")
    run = RunDir(folder / "stopped")
    # Line 1 is the evaluation before the first step.
    code, output = stop_qlora(folder, "resume", run.root, lines_of=run.metrics, count=3)
    assert code == 85, output
    assert "SIGTERM: stopping, with every complete step saved" in output
    return run


@pytest.fixture
def copy_of(tmp_path):
    """Copy a run, to go on with."""

    def copy(run):
        # The launcher must cope with such a name, and a run with having been moved.
        path = tmp_path / f"{run.root.name} with 'odd' \"names\""
        shutil.copytree(run.root, path)
        return RunDir(path)

    return copy


@pytest.fixture
def half_run(stopped_run, copy_of):
    """A copy of the stopped run."""
    return copy_of(stopped_run)


@pytest.fixture
def start(tmp_path):
    """Start ``qlora resume RUN``, wait for a line of its metrics; ended with the test."""
    processes = []

    def go(verb, run, *, count):
        process = start_qlora(tmp_path, verb, run, lines_of=run / "metrics.jsonl", count=count)
        processes.append(process)
        return process

    yield go
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def stop(tmp_path):
    """Start ``qlora resume RUN`` and send a signal at a line of its metrics."""

    def go(verb, run, *overrides, count, number=signal.SIGTERM):
        metrics = run / "metrics.jsonl"
        return stop_qlora(
            tmp_path, verb, run, *overrides, lines_of=metrics, count=count, number=number
        )

    return go


def num_lines(path):
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def pytest_collection_modifyitems(items):
    """Skip GPU tests where there are too few, saying how many they need."""
    gpus = None
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        if gpus is None:
            import torch

            gpus = torch.cuda.device_count()
        wanted = marker.args[0] if marker.args else 1
        if gpus < wanted:
            item.add_marker(pytest.mark.skip(reason=f"needs {wanted} GPUs, there are {gpus}"))
