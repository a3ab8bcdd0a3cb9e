"""Models of real shapes with random weights, and long rows of text, for machines without a hub."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_dist.shapes import SHAPES, ModelShape

CORPUS = Path(__file__).parent.parent / "demo" / "corpus.txt"


def make_model(
    folder: Path, shape_name: str, *, num_layers: int | None = None, tokenizer: Path | None = None
) -> Path:
    """Write a LLaMA of a known shape with random weights in bf16, and a tokenizer; returns it.

    Args:
        folder: Where.
        shape_name: A name in ``qlora_dist.shapes.SHAPES``.
        num_layers: Another number of layers than the shape's.
        tokenizer: Folder of a real tokenizer, whose vocabulary the model then has; else a small one
            is trained.
    """
    shape = SHAPES[shape_name]
    real = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else None
    config = config_of(
        shape,
        vocab_size=len(real) if real else shape.vocab_size,
        num_hidden_layers=num_layers or shape.num_layers,
    )
    torch.manual_seed(0)
    # Drawn on the GPU where there is one: a CPU takes minutes for 7 B weights.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (real or small_tokenizer()).save_pretrained(folder)
    del model
    # Other processes are going to need the GPU.
    torch.cuda.empty_cache()
    return folder


def config_of(shape: ModelShape, **changes: object) -> LlamaConfig:
    """A LLaMA's configuration, in bf16."""
    values = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "architectures": ["LlamaForCausalLM"],
        "dtype": torch.bfloat16,
    }
    return LlamaConfig(**values | changes)


def small_tokenizer(vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, trained on the demonstration's corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.read_text(encoding="utf-8").splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_tiny_model(folder: Path) -> Path:
    """Write a LLaMA of two layers with random weights and 512 tokens; returns the folder."""
    small_tokenizer(vocab_size=512).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(path: Path, *, num_rows: int, lines_per_row: int) -> Path:
    """Write rows whose answer is many lines of the demonstration's corpus; returns the path."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    with path.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            picked = [lines[(row * 7 + i) % len(lines)] for i in range(lines_per_row)]
            file.write(json.dumps({"input": f"{row}", "output": "\n".join(picked)}) + "\n")
    return path
