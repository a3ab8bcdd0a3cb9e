"""Shapes of decoder models: a table that needs no network, and a reader for local config.json.

``plan`` counts parameters and bytes from these; the worker compares them with the model that
it has really loaded.
"""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from qlora_dist.errors import PlanError
from qlora_dist.hub import looks_like_path

Size = Annotated[int, Field(strict=True, ge=1, le=2**31)]


class ModelShape(BaseModel):
    """Sizes of a LLaMA-like decoder: RMS norms, rotary attention, a gated MLP."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    vocab_size: Size
    """Rows of the embedding."""
    hidden_size: Size
    """Width of the residual stream."""
    intermediate_size: Size
    """Width inside the MLP."""
    num_layers: Size
    """Decoder layers."""
    num_heads: Size
    """Attention heads."""
    num_kv_heads: Size
    """Key and value heads; fewer than num_heads under grouped-query attention."""
    head_dim: Size
    """Width of one head."""
    max_positions: Size
    """Longest sequence that the model was trained for, in tokens."""
    tie_embeddings: bool = False
    """The output head is the embedding."""
    qkv_bias: bool = False
    """Query, key and value projections have a bias (Qwen2)."""
    qk_norm: bool = False
    """Queries and keys are normalised per head (Qwen3)."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder layer: name -> (out_features, in_features)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (query, hidden),
            "k_proj": (key_value, hidden),
            "v_proj": (key_value, hidden),
            "o_proj": (hidden, query),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    @property
    def num_linear_params(self) -> int:
        """Weights of all linear layers inside the decoder layers: what NF4 quantises."""
        return self.num_layers * sum(rows * cols for rows, cols in self.linears.values())

    @property
    def num_embedding_params(self) -> int:
        """Weights of the embedding and of the output head, a tied one counted once."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @property
    def num_other_params(self) -> int:
        """Norms and biases."""
        norms = self.hidden_size * (2 * self.num_layers + 1)
        if self.qk_norm:
            norms += 2 * self.head_dim * self.num_layers
        biases = self.num_heads * self.head_dim + 2 * self.num_kv_heads * self.head_dim
        return norms + (biases * self.num_layers if self.qkv_bias else 0)

    @property
    def num_params(self) -> int:
        """All parameters of the base model."""
        return self.num_linear_params + self.num_embedding_params + self.num_other_params


def _llama(
    hidden: int, inner: int, layers: int, heads: int, *, positions: int = 2048
) -> ModelShape:
    return ModelShape(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=positions,
    )


# Sources: LLaMA, arXiv 2302.13971, table 2; Llama 2, arXiv 2307.09288, section 2.2; inner widths
# from the config.json published with each model.
SHAPES: dict[str, ModelShape] = {
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-33b": _llama(6656, 17920, 60, 52),
    "llama-65b": _llama(8192, 22016, 80, 64),
    "llama-2-7b": _llama(4096, 11008, 32, 32, positions=4096),
    "llama-2-13b": _llama(5120, 13824, 40, 40, positions=4096),
    "llama-2-70b": _llama(8192, 28672, 80, 64, positions=4096).model_copy(
        update={"num_kv_heads": 8}
    ),
    "smollm2-135m": ModelShape(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_positions=8192,
        tie_embeddings=True,
    ),
}

# Hub names, lower case. Meta published the second-largest LLaMA as 33B in the paper and as 30B in
# the weights.
HUB_NAMES: dict[str, str] = {
    "huggyllama/llama-7b": "llama-7b",
    "huggyllama/llama-13b": "llama-13b",
    "huggyllama/llama-30b": "llama-33b",
    "huggyllama/llama-65b": "llama-65b",
    "meta-llama/llama-2-7b-hf": "llama-2-7b",
    "meta-llama/llama-2-13b-hf": "llama-2-13b",
    "meta-llama/llama-2-70b-hf": "llama-2-70b",
    "meta-llama/llama-2-7b-chat-hf": "llama-2-7b",
    "meta-llama/llama-2-13b-chat-hf": "llama-2-13b",
    "meta-llama/llama-2-70b-chat-hf": "llama-2-70b",
    "huggingfacetb/smollm2-135m": "smollm2-135m",
    "huggingfacetb/smollm2-135m-instruct": "smollm2-135m",
}

# Families whose decoder layer is the one that ModelShape describes.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def find_shape(source: str, shape: str | ModelShape | None) -> ModelShape:
    """Shape of the model that a spec names, without a network.

    Args:
        source: ``model.source``: a folder with config.json, or a hub name.
        shape: ``model.shape``: a name in :data:`SHAPES`, a whole shape, or None to look it up.

    Raises:
        PlanError: The shape is in no table, and ``source`` holds no readable config.json.
    """
    if isinstance(shape, ModelShape):
        return shape
    if shape is not None:
        if shape not in SHAPES:
            raise PlanError(
                f"model.shape: no shape is called {shape!r}; known: {', '.join(SHAPES)}"
            )
        return SHAPES[shape]
    config = Path(source) / "config.json"
    try:
        config = config.expanduser()
        if config.is_file():
            return read_config(config)
        if looks_like_path(source) and not config.parent.is_dir():
            raise PlanError(f"model.source: there is no folder {source!r} (looked in {Path.cwd()})")
    except (OSError, RuntimeError) as error:
        raise PlanError(f"model.source: {source[:80]!r} is no usable path: {error}") from error
    name = HUB_NAMES.get(source.lower())
    if name is not None:
        return SHAPES[name]
    raise PlanError(
        f"model.source: the shape of {source!r} is not known here, and a plan asks no network. "
        f"Give a folder that holds its config.json, or model.shape: one of {', '.join(SHAPES)}, "
        "or a mapping with vocab_size, hidden_size, ..."
    )


def read_config(path: Path) -> ModelShape:
    """Shape from a Hugging Face ``config.json``.

    Raises:
        PlanError: The file is not JSON, lacks a size, or is of a family with other layers.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        family = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"model.source: cannot read {path}: {error}") from error
    if family not in FAMILIES:
        raise PlanError(
            f"model.source: {path} is of type {family!r}; the plan counts {', '.join(FAMILIES)}. "
            "For another decoder with the same kind of layers give model.shape in full."
        )
    try:
        return shape_of_config(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PlanError(f"model.source: {path} lacks a usable size: {error}") from error


def shape_of_config(config: dict[str, Any]) -> ModelShape:
    """Shape from the values of a Hugging Face configuration of one of ``FAMILIES``."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return ModelShape(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        max_positions=config["max_position_embeddings"],
        # transformers leaves a tied head unsaid where it is the family's default: none of these
        # families but Qwen's small models, which do say it.
        tie_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=config["model_type"] == "qwen2",
        qk_norm=config["model_type"] == "qwen3",
    )
