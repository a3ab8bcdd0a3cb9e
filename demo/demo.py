"""``make demo``: the whole line on a real model, with a real interruption, and a report at the end.

Everything is done through the command line, as a user would.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from model import convert

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"
QUESTION = "Where is the trained adapter?"


def qlora(*arguments: object) -> list[str]:
    """Argument list of the command line."""
    return [sys.executable, "-m", "qlora_launch.cli", *map(str, arguments)]


def run(*arguments: object) -> None:
    """Run a command and show what it says."""
    print("$ qlora " + " ".join(map(str, arguments)), flush=True)
    subprocess.run(qlora(*arguments), cwd=ROOT, check=True)


def run_until(step: int, run_dir: Path, *arguments: object) -> None:
    """Run a command, and send it a real SIGTERM once a step is complete."""
    print("$ qlora " + " ".join(map(str, arguments)), flush=True)
    process = subprocess.Popen(qlora(*arguments), cwd=ROOT)
    while step not in [r["step"] for r in records(run_dir) if r["kind"] == "train"]:
        if process.poll() is not None:
            raise SystemExit("demo: the run ended before it could be interrupted")
        time.sleep(0.05)
    print(f"$ kill -TERM {process.pid}", flush=True)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 85:
        raise SystemExit(f"demo: the interrupted run ended with {process.returncode}, not 85")


def records(run_dir: Path) -> list[dict]:
    """Records of a run's metrics.jsonl."""
    try:
        text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def answer(*arguments: object) -> str:
    """The model's answer to the question."""
    command = qlora("generate", *arguments, QUESTION, "--max-new-tokens", 32)
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return " ".join(done.stdout.split())


def settings(model: Path) -> list[str]:
    """Overrides for this machine: its GPUs where it has some, two CPU processes elsewhere."""
    import torch

    gpus = min(torch.cuda.device_count(), 2)
    overrides = [f"model.source={model}"]
    if gpus:
        overrides += [f"resources={{gpus_per_node: {gpus}}}", "model.dtype=bf16"]
    return overrides


def main() -> int:
    """Run the demonstration; the exit code says whether the resumed run was the unbroken one."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    begin = time.monotonic()
    CACHE.mkdir(exist_ok=True)
    model = convert(CACHE / "smollm2-135m-instruct")
    runs = CACHE / f"demo-{int(time.time())}"
    stopped, whole = runs / "stopped", runs / "whole"
    overrides = settings(model)
    config = ROOT / "configs" / "demo.yaml"

    run("plan", config, *overrides)
    run("data", config, *overrides, "--show", 1)
    run_until(8, stopped, "run", config, *overrides, f"run_dir={stopped}")
    run("resume", stopped)
    run("run", config, *overrides, f"run_dir={whole}")
    run("export", stopped)

    from qlora_dist.layout import RunDir
    from qlora_dist.train.compare import differences, fingerprint

    different = differences(RunDir(whole), RunDir(stopped))
    held_out = [r["loss"] for r in records(stopped) if r["kind"] == "eval"]
    train = [r for r in records(stopped) if r["kind"] == "train"]
    print()
    print("report")
    print(f"  trained           {sum(r['tokens'] for r in train):,} tokens in {len(train)} steps")
    print(f"  held-out loss     {held_out[0]:.4f} before, {held_out[-1]:.4f} after")
    print(f"  question          {QUESTION}")
    print(f"  before            {answer(stopped, '--base')}")
    print(f"  after             {answer(stopped)}")
    print("  resume check      losses, gradient norms, sample ids, weights, moments, generators:")
    if different:
        print("                    DIFFERENT from the unbroken run:")
        print("\n".join(f"                    {line}" for line in different[:10]))
    else:
        digest = fingerprint(RunDir(stopped))["weights"]
        print(f"                    equal, bit for bit; adapter sha256 {digest[:16]}...")
    print(f"  time              {time.monotonic() - begin:.0f} s")
    print(f"  files             {stopped}")
    return 1 if different or held_out[-1] >= held_out[0] else 0


if __name__ == "__main__":
    sys.exit(main())
