"""Packs are full, whole and the same everywhere; a packed sample cannot tell that it is packed."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.data.packing import best_fit
from qlora_dist.data.tokens import Sample
from qlora_dist.train.batch import make_batch
from qlora_dist.train.objective import summed_loss


def simple_best_fit(lengths, capacity):
    """Best-fit decreasing as its definition says, a sequence at a time."""
    sequences = []
    for index in np.argsort(-lengths, kind="stable"):
        rooms = [capacity - sum(lengths[i] for i in s) for s in sequences]
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= lengths[index]]
        if fitting:
            sequences[min(fitting)[1]].append(index)
        else:
            sequences.append([index])
    return sequences


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packs_hold_every_sample_once_and_are_as_few_as_best_fit_makes_them(lengths):
    lengths = np.array(lengths, np.int64)
    offsets, members = best_fit(lengths, capacity=20)
    assert sorted(members.tolist()) == list(range(len(lengths)))
    packs = [members[a:b] for a, b in itertools.pairwise(offsets)]
    assert all(0 < lengths[pack].sum() <= 20 for pack in packs)
    assert len(packs) == len(simple_best_fit(lengths, 20))


def test_a_sample_that_cannot_fit_is_an_error():
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.8"):
        best_fit(np.array([3, 9]), capacity=8)


def make_samples(rng, count):
    samples = []
    for length in rng.integers(2, 12, count):
        learned = rng.random(length) < 0.7
        learned[-1] = True
        samples.append(Sample(rng.integers(3, 200, length).astype(np.int32), learned, 0, 0))
    return samples


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=200,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="sdpa",
            initializer_range=0.3,
        )
    )


def run(model, rows):
    """Logits of each sample's tokens, in order, and gradients of all parameters."""
    model.zero_grad()
    batch = make_batch(rows, flat=False, pad_id=0, device=torch.device("cpu"))
    summed_loss(model, batch).backward()
    logits = model(input_ids=batch.input_ids, **batch.model_inputs).logits.detach()
    parts = []
    for row, samples in enumerate(rows):
        start = 0
        for sample in samples:
            parts.append(logits[row, start : start + len(sample.ids)])
            start += len(sample.ids)
    return parts, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_packed_batch_gives_each_sample_the_logits_and_gradients_that_it_has_alone(model):
    samples = make_samples(np.random.default_rng(1), 7)
    packed, together = run(model, [samples[:4], samples[4:6], samples[6:]])
    sums = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
    for sample, logits in zip(samples, packed, strict=True):
        (alone,), gradients = run(model, [[sample]])
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=2e-5)
        for name, gradient in gradients.items():
            sums[name] += gradient
    for name, gradient in together.items():
        assert torch.norm(gradient - sums[name]) < 1e-5 * torch.norm(gradient), name


def test_samples_that_do_see_one_another_are_noticed(model):
    """The check above bites: without the restarting positions the logits are others."""
    samples = make_samples(np.random.default_rng(1), 3)
    batch = make_batch([samples], flat=False, pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        apart = model(input_ids=batch.input_ids, **batch.model_inputs).logits
        merged = model(input_ids=batch.input_ids, use_cache=False).logits
    first = len(samples[0].ids)
    torch.testing.assert_close(apart[:, :first], merged[:, :first], rtol=1e-4, atol=1e-4)
    assert (apart[:, first:] - merged[:, first:]).abs().max() > 0.1


def test_a_flat_batch_is_the_samples_in_one_row_with_their_bounds():
    samples = make_samples(np.random.default_rng(2), 5)
    batch = make_batch([samples[:2], samples[2:]], flat=True, pad_id=0, device=torch.device("cpu"))
    bounds = batch.model_inputs["cu_seq_lens_q"].tolist()
    assert batch.input_ids.shape == (1, sum(len(s.ids) for s in samples))
    assert (batch.targets != -100).sum() == sum(s.num_targets for s in samples)
    for sample, start, end in zip(samples, bounds[:-1], bounds[1:], strict=True):
        assert batch.input_ids[0, start:end].tolist() == sample.ids.tolist()
        places = batch.model_inputs["position_ids"][0, start:end]
        assert places.tolist() == list(range(end - start))
    assert batch.model_inputs["max_length_q"] == max(len(s.ids) for s in samples)
