"""The kernel for samples of many lengths computes what the masked one does."""

import numpy as np
import pytest
import torch

from qlora_dist.data.tokens import Sample
from qlora_dist.train.attention import register
from qlora_dist.train.batch import make_batch
from qlora_dist.train.objective import summed_loss


@pytest.mark.gpu(1)
def test_varlen_gives_each_sample_the_logits_and_gradients_of_the_masked_kernel():
    from transformers import LlamaConfig, LlamaForCausalLM

    register()
    rng = np.random.default_rng(0)
    samples = [
        Sample(rng.integers(3, 500, n).astype(np.int32), np.ones(n, bool), 0, 0)
        for n in (5, 130, 64, 1, 200)
    ]
    results = {}
    for kernel in ("sdpa", "varlen"):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=500,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
            attn_implementation=kernel,
        )
        model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
        batch = make_batch(
            [samples[:3], samples[3:]],
            flat=kernel == "varlen",
            pad_id=0,
            device=torch.device("cuda"),
        )
        loss = summed_loss(model, batch)
        loss.backward()
        results[kernel] = (
            float(loss.detach()),
            {n: p.grad.float() for n, p in model.named_parameters()},
        )
    (masked, wanted), (flat, found) = results["sdpa"], results["varlen"]
    assert flat == pytest.approx(masked, rel=2e-3)
    for name, gradient in wanted.items():
        assert torch.norm(found[name] - gradient) < 0.03 * torch.norm(gradient), name
