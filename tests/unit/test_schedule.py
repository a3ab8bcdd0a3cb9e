"""Who sees which sample when."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.data import schedule as schedules
from qlora_dist.data.schedule import SampleSchedule, longest_micro_batch, shard
from qlora_dist.plan import Length
from qlora_dist.spec import ScheduleSection
from qlora_dist.train.optimizer import learning_rate

sizes = st.integers(1, 60)


def make(num_samples, seed, grouped, group_size=4):
    lengths = np.random.default_rng(seed).integers(1, 99, num_samples) if grouped else None
    return SampleSchedule(num_samples, seed=seed, lengths=lengths, group_size=group_size)


@settings(deadline=None)
@given(sizes, st.integers(0, 2**40), st.booleans(), st.integers(1, 3))
def test_every_epoch_has_every_sample_once(num_samples, seed, grouped, epochs):
    seen = make(num_samples, seed, grouped).samples(0, num_samples * epochs)
    for epoch in seen.reshape(epochs, num_samples):
        assert sorted(epoch) == list(range(num_samples))


@settings(deadline=None)
@given(sizes, st.integers(0, 99), st.booleans(), st.integers(0, 300), st.integers(1, 99))
def test_any_position_can_be_entered_directly(num_samples, seed, grouped, position, count):
    whole = make(num_samples, seed, grouped).samples(0, position + count)
    part = make(num_samples, seed, grouped).samples(position, count)
    assert part.tolist() == whole[position:].tolist()


@given(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)]), st.integers(1, 4))
def test_ranks_share_a_batch_in_its_order_at_any_world_size(shape, accumulation):
    world_size, micro_size = shape
    batch = np.arange(world_size * micro_size * accumulation)
    parts = [
        shard(batch, rank=r, world_size=world_size, micro_size=micro_size)
        for r in range(world_size)
    ]
    assert np.concatenate(parts, axis=1).reshape(-1).tolist() == batch.tolist()


@settings(deadline=None, max_examples=50)
@given(st.data(), sizes, st.integers(0, 99), st.booleans())
def test_resumes_at_random_positions_and_world_sizes_see_the_same_samples(
    data, num_samples, seed, grouped
):
    """Each attempt has processes and a micro-batch of its own, and ends anywhere."""
    global_size = data.draw(st.sampled_from([4, 8, 12]))
    steps = data.draw(st.integers(1, 30))
    whole = make(num_samples, seed, grouped, global_size).samples(0, steps * global_size)
    seen, step = [], 0
    while step < steps:
        world_size = data.draw(st.sampled_from([1, 2, 4]))
        micro_size = data.draw(
            st.sampled_from([m for m in (1, 2, 3) if global_size % (m * world_size) == 0])
        )
        schedule = make(num_samples, seed, grouped, global_size)
        for _ in range(data.draw(st.integers(1, steps - step))):
            batch = schedule.samples(step * global_size, global_size)
            parts = [
                shard(batch, rank=r, world_size=world_size, micro_size=micro_size)
                for r in range(world_size)
            ]
            seen += np.stack(parts, axis=1).reshape(-1).tolist()
            step += 1
    assert seen == whole.tolist()


def test_the_order_is_this_one_for_ever():
    """A change here breaks the resume of every run there is."""
    assert make(10, 7, grouped=False).samples(0, 20).tolist() == [
        *(8, 4, 3, 6, 2, 1, 0, 5, 9, 7),
        *(7, 9, 6, 1, 4, 8, 3, 2, 5, 0),
    ]


def test_grouping_puts_the_longest_first_and_neighbours_near():
    schedule = make(400, 3, grouped=True, group_size=8)
    lengths = np.random.default_rng(3).integers(1, 99, 400)
    order = schedule.samples(0, 400)
    assert lengths[order[0]] == lengths.max()
    spread = np.mean([np.ptp(lengths[batch]) for batch in order.reshape(-1, 8)])
    plain = make(400, 3, grouped=False).samples(0, 400)
    assert spread < 0.3 * np.mean([np.ptp(lengths[batch]) for batch in plain.reshape(-1, 8)])


@pytest.mark.parametrize(
    ("kind", "maker"),
    [
        ("constant", "get_constant_schedule_with_warmup"),
        ("linear", "get_linear_schedule_with_warmup"),
        ("cosine", "get_cosine_schedule_with_warmup"),
    ],
)
@pytest.mark.parametrize("warmup", [0, 3])
def test_rates_are_those_of_transformers(kind, maker, warmup):
    import torch
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    arguments = {"num_warmup_steps": warmup}
    if kind != "constant":
        arguments["num_training_steps"] = 12
    scheduler = getattr(transformers, maker)(optimizer, **arguments)
    section, length = ScheduleSection(kind=kind, steps=12), Length(12, warmup, None, None, None)
    for step in range(12):
        ours = learning_rate(step, section, length, peak=0.5)
        assert math.isclose(ours, optimizer.param_groups[0]["lr"], rel_tol=1e-12)
        optimizer.step()
        scheduler.step()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 9), st.integers(1, 30), st.booleans())
def test_no_forward_pass_that_is_to_come_is_longer_than_the_longest(
    num_samples, micro_size, skipped, count, padded
):
    lengths = np.random.default_rng(num_samples).integers(1, 99, num_samples)
    order = make(num_samples, 3, grouped=False)
    begin, end = skipped * micro_size, (skipped + count) * micro_size

    def size(rows):
        return max(lengths[rows]) * micro_size if padded else sum(lengths[rows])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "_AT_ONCE", 7)
        patch.setattr(schedules, "_SEARCHED_EPOCHS", 999)
        found = longest_micro_batch(
            order, lengths, begin=begin, end=end, micro_size=micro_size, padded=padded
        )
    passes = order.samples(begin, end - begin).reshape(-1, micro_size)
    assert found.tolist() in passes.tolist()
    assert size(found) == max(size(rows) for rows in passes)


def test_of_equal_forward_passes_one_that_needs_a_mask_is_the_longest():
    lengths = np.array([512] * 39 + [100])
    order = make(40, 3, grouped=False)
    found = longest_micro_batch(order, lengths, begin=0, end=40, micro_size=4, padded=True)
    assert sorted(lengths[found]) == [100, 512, 512, 512]


def test_the_search_for_the_longest_ends_in_a_run_without_end():
    order = make(10, 3, grouped=False)
    lengths = np.arange(1, 11)
    found = longest_micro_batch(order, lengths, begin=0, end=2**40, micro_size=2, padded=False)
    assert lengths[found].sum() >= 18
