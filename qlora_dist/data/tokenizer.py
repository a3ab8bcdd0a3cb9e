"""The model's tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import Any

from qlora_dist.errors import ModelError
from qlora_dist.hub import explain, looks_like_path, read_token
from qlora_dist.spec import RunSpec


def load_tokenizer(spec: RunSpec) -> Any:
    """The model's tokenizer, padding on the right.

    Raises:
        ModelError: It is missing or gated, or has no EOS token.
    """
    from transformers import AutoTokenizer

    model = spec.model
    if looks_like_path(model.source) and not Path(model.source).expanduser().is_dir():
        raise ModelError(f"model.source: there is no folder {model.source!r}")
    source = model.source
    if Path(source).expanduser().is_dir():
        source = str(Path(source).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=model.revision,
            padding_side="right",
            trust_remote_code=model.trust_remote_code,
            token=read_token(model.token_file),
        )
    except (OSError, ValueError) as error:
        message = explain(error, kind="tokenizer", key="model.source", source=model.source)
        raise ModelError(message) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.source: the tokenizer of {model.source!r} has no EOS token")
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Fingerprint of what a tokenizer makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    special = [type(tokenizer).__name__, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(f"{special}{rules}".encode()).hexdigest()
