"""The product of a frozen matrix and its adapter, against PEFT's own."""

import pytest
import torch

from qlora_dist import sizes
from qlora_dist.spec_file import spec_from_tree
from qlora_dist.train import dropout, lora
from qlora_dist.train.adapters import add_adapter, trainable
from qlora_dist.train.load import load_base
from qlora_dist.train.lora import block_ranges, fuse
from tests.unit.test_spec import GOOD

CPU = torch.device("cpu")


def load(tiny_model, **changes):
    tree = {**GOOD, "model": {"source": str(tiny_model), "dtype": "fp32"}, **changes}
    spec = spec_from_tree(tree)
    base = load_base(spec, device=CPU, attention="sdpa")
    model = add_adapter(base, spec.adapter, seed=1, device=CPU)
    fuse(model)
    for name, parameter in trainable(model).items():
        # B starts at zero, and would hide what goes through it.
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def step(model, *, seed=0):
    """Logits and gradients of one forward and backward pass in training mode."""
    model.train()
    torch.manual_seed(seed)
    tokens = torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(5))
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in trainable(model).items()}
    for parameter in trainable(model).values():
        parameter.grad = None
    return out.logits.detach(), grads


def as_peft(model):
    """The same model without our products."""
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model


def assert_close(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert set(ours[1]) == set(theirs[1])
    for name, grad in theirs[1].items():
        error = (ours[1][name] - grad).norm() / grad.norm()
        assert error < 1e-5, (name, float(error))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantization": {"kind": "nf4", "double": False}},
        {"quantization": {"kind": "none"}},
        {"adapter": {"r": 4, "target": ["q_proj", "down_proj"]}},
    ],
    ids=["nf4", "single", "none", "some layers"],
)
def test_logits_and_gradients_are_pefts(tiny_model, changes):
    model = load(tiny_model, **changes)
    ours = step(model)
    assert_close(ours, step(as_peft(model)))


def test_a_matrix_in_slices_is_the_matrix(tiny_model, monkeypatch):
    model = load(tiny_model)
    whole = step(model)
    monkeypatch.setattr(lora, "dequantised_slices", lambda *_: 10)
    assert_close(step(model), whole)


def test_a_slice_is_no_larger_than_a_cache_or_than_what_it_is_multiplied_with():
    # LLaMA-65B's MLP, 344 MiB in bf16.
    assert sizes.dequantised_slices(22016, 8192, 2, tokens=512) == 11
    assert sizes.dequantised_slices(22016, 8192, 2, tokens=4096) == 2
    assert sizes.dequantised_slices(4096, 4096, 2, tokens=1) == 1


@pytest.mark.parametrize(("count", "parts"), [(11008, 3), (28672, 7), (100, 3), (64, 5)])
def test_slices_begin_at_whole_blocks_and_leave_nothing_out(count, parts):
    cuts = block_ranges(count, parts)
    assert [i for begin, end in cuts for i in range(begin, end)] == list(range(count))
    assert len(cuts) <= parts
    assert all(begin % 64 == 0 and begin < end for begin, end in cuts)


def test_dropout_is_on_the_adapters_input_alone_and_drawn_from_the_generator(tiny_model):
    model = load(tiny_model, adapter={"r": 4, "dropout": 0.5})
    first, again, other = step(model), step(model), step(model, seed=1)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert not torch.equal(first[0], other[0])
    # Its mean over many draws is the product without it.
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 64)
    torch.manual_seed(0)
    draws = layer(x.expand(20_000, -1))
    layer.eval()
    assert torch.allclose(draws.mean(0), layer(x)[0], atol=0.02)
    assert (draws - layer(x)).abs().max() > 0.05


def test_gradients_with_dropout_are_those_of_the_formula(tiny_model):
    model = load(tiny_model, adapter={"r": 4, "alpha": 8, "dropout": 0.3})
    layer = model.base_model.model.model.layers[1].mlp.down_proj.train()
    x = torch.randn(7, 192, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    y.square().sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    ours = [x.grad, a.grad, b.grad]
    torch.manual_seed(3)
    weight = layer.get_base_layer()(torch.eye(192)).T.detach()
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]
    dropped = dropout._dropped(leaves[0], dropout.draw_seed(), 0.3)
    assert set((dropped == 0).unique().tolist()) == {True, False}
    wanted = leaves[0] @ weight.T + 2.0 * (dropped @ leaves[1].T) @ leaves[2].T
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    wanted.square().sum().backward()
    for got, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-4)


def test_recomputation_draws_the_same_masks(tiny_model):
    adapter = {"r": 4, "dropout": 0.3}
    changes = {"source": str(tiny_model), "dtype": "fp32"}
    kept = step(load(tiny_model, model=changes, adapter=adapter))
    changes["gradient_checkpointing"] = True
    recomputed = step(load(tiny_model, model=changes, adapter=adapter))
    assert torch.equal(recomputed[0], kept[0])
    assert all(torch.equal(grad, kept[1][name]) for name, grad in recomputed[1].items())


def test_recomputation_ends_before_a_layers_last_large_product(tiny_model, monkeypatch):
    changes = {"source": str(tiny_model), "dtype": "fp32"}
    kept = step(load(tiny_model, model=changes))
    model = load(tiny_model, model={**changes, "gradient_checkpointing": True})
    names = {id(m): n.rpartition(".")[2] for n, m in model.named_modules() if "base_layer" not in n}
    owners = {id(m.base_layer): names[id(m)] for m in model.modules() if hasattr(m, "base_layer")}
    done = []
    times = lora._times
    monkeypatch.setattr(
        lora, "_times", lambda x, layer: done.append(owners[id(layer)]) or times(x, layer)
    )
    recomputed = step(model)
    layers = len(model.base_model.model.model.layers)
    assert {name: done.count(name) for name in done} == {
        name: layers * (1 if name == "down_proj" else 2) for name in set(owners.values())
    }
    # The same products of the same numbers, made twice.
    assert torch.equal(recomputed[0], kept[0])
    assert all(torch.equal(grad, kept[1][name]) for name, grad in recomputed[1].items())


def test_in_evaluation_pefts_own_code_runs(tiny_model):
    model = load(tiny_model).eval()
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        ours = model(input_ids=tokens).logits
        assert torch.equal(ours, as_peft(model)(input_ids=tokens).logits)
