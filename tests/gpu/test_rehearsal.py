"""A batch that does not fit is refused before the first step."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

VOCABULARY, ROWS = 1 << 20, 64


@pytest.mark.gpu(1)
def test_a_batch_that_does_not_fit_ends_the_run_before_its_first_step(
    config, qlora, tiny_model, tmp_path
):
    """Logits of 64 sequences of about 200 tokens over a million entries: more than 100 GiB."""
    model, data = tmp_path / "wide", tmp_path / "long.jsonl"
    widen(tiny_model, model)
    row = json.dumps({"input": "?", "output": "word " * 200})
    data.write_text(f"{row}\n" * ROWS)
    path = config(
        "large",
        model__source=str(model),
        data={"source": str(data), "format": "input-output", "max_tokens": 250},
        strategy__kind="single",
        resources={"gpus_per_node": 1},
        batch={"global_size": ROWS, "micro_size": ROWS},
    )
    done = qlora("run", path, code=2)
    assert "does not fit" in done.stderr + done.stdout
    metrics = path.with_suffix("") / "metrics.jsonl"
    assert not metrics.exists() or '"train"' not in metrics.read_text()


def widen(source, folder):
    """The tiny model with a large vocabulary, most of which is never used."""
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(VOCABULARY)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
