"""Norms, gates and rotations in one pass, against transformers' own."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama import modeling_llama

from qlora_dist.train import pointwise

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(params=["llama", "qwen3"])
def models(request):
    """The same frozen model twice, the second one fused, both in training mode."""
    torch.manual_seed(0)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    }[request.param]()
    made.requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.normal_(mean=1, std=0.2)
    theirs, ours = made.train(), copy.deepcopy(made)
    pointwise.fuse(ours)
    return theirs, ours.train()


def through(model, dtype):
    """Logits, and the gradient of the embedded tokens."""
    model.to(dtype)
    embedded = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    embedded.requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits.float().square().sum().backward()
    return logits.detach(), embedded.grad


def test_forward_passes_are_transformers_bit_for_bit(models):
    theirs, ours = (through(model, torch.bfloat16) for model in models)
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_gradients_are_transformers(models, dtype, bound):
    theirs, ours = (through(model, dtype)[1].double() for model in models)
    assert (ours - theirs).norm() < bound * theirs.norm()


def test_every_norm_and_gate_of_a_layer_is_fused(models):
    _, ours = models
    fused = [name for name, module in ours.named_modules() if "forward" in module.__dict__]
    kinds = ("norm", "mlp")
    assert fused == [name for name, _ in ours.named_modules() if name.endswith(kinds)]
    assert hasattr(modeling_llama.apply_rotary_pos_emb, "fused")


def test_in_evaluation_transformers_own_code_runs(models, monkeypatch):
    theirs, ours = models
    monkeypatch.setattr(pointwise, "normalised", None)
    monkeypatch.setattr(pointwise, "gated", None)
    tokens = torch.arange(3, 30)[None]
    assert torch.equal(ours.eval()(tokens).logits, theirs.eval()(tokens).logits)


def test_a_norm_that_is_trained_gets_its_gradient(models):
    _, ours = models
    norm = ours.model.layers[0].input_layernorm
    norm.weight.requires_grad_()
    through(ours, torch.float32)
    assert norm.weight.grad.abs().sum() > 0


def test_what_a_norm_and_a_gate_keep_is_what_they_are_given():
    kept = []
    x, up = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pointwise._Norm.apply(x, torch.ones(8), 1e-6)
        pointwise._Gate.apply(x, up)
    assert [tuple(tensor.shape) for tensor in kept] == [(3, 8), (3, 1), (8,), (3, 8), (3, 8)]


def test_other_activations_are_left_alone():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    pointwise.fuse(model)
    assert "forward" not in model.model.layers[0].mlp.__dict__
    pointwise.fuse(nn.Linear(2, 2))
