"""Training is what a plain loop of transformers and PEFT does; `make fidelity` is the whole table."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_losses_and_gradients_are_the_plain_loops(tiny_model):
    command = [sys.executable, str(ROOT / "bench" / "fidelity.py"), f"--model={tiny_model}"]
    done = subprocess.run(
        [*command, "--only=2,2"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "within the bounds" in done.stdout
