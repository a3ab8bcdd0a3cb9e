"""Who sees which sequence when: pure functions of seed and position.

The position in the data is one integer, the number of sequences (samples, or packs of them) that
the whole run has consumed; it is independent of the number of processes. Epochs join: a batch that
reaches the end of one is filled from the next.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from qlora_dist.data.corpus import Corpus
from qlora_dist.plan import CorpusFacts, attention_of
from qlora_dist.spec import RunSpec

# transformers' LengthGroupedSampler sorts inside groups of at most this many global batches.
_MEGABATCH = 50

# Global batches from which the part of padding is taken; an epoch of fewer is taken whole.
_MEASURED_BATCHES = 1000
# Sequences that are looked at together in search of the longest batch, and epochs at most: later
# ones have the same sequences, in other company.
_AT_ONCE, _SEARCHED_EPOCHS = 1 << 20, 8


class SampleSchedule:
    """The order of samples over all epochs.

    Args:
        num_samples: Samples in an epoch.
        seed: Each epoch's order follows from it and the epoch's number.
        lengths: Tokens of each sample, int64 of shape ``(num_samples,)``, to group samples of
            similar length; None for a plain shuffle.
        group_size: Global batch size, the unit of grouping.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        lengths: npt.NDArray[np.int64] | None = None,
        group_size: int = 1,
    ) -> None:
        assert num_samples > 0
        self.num_samples = num_samples
        self._seed, self._lengths, self._group_size = seed, lengths, group_size
        self._order = lru_cache(maxsize=2)(self._make_order)

    def samples(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """Indices of the ``count`` samples after ``position``, int64 of shape ``(count,)``."""
        parts: list[npt.NDArray[np.int64]] = []
        while count > 0:
            epoch, offset = divmod(position, self.num_samples)
            part = self._order(epoch)[offset : offset + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts)

    def _make_order(self, epoch: int) -> npt.NDArray[np.int64]:
        # Raw bits of a bit generator are stable over numpy's versions; its permutations are not.
        bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
        order = np.argsort(bits.random_raw(self.num_samples), kind="stable")
        if self._lengths is None:
            return order
        return _group_by_length(order, self._lengths, self._group_size)


def _group_by_length(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], group_size: int
) -> npt.NDArray[np.int64]:
    """Sort by length, longest first, inside groups of many batches; the longest of all comes first.

    Source: transformers, trainer_pt_utils.py, get_length_grouped_indices (4.31, as the original
    recipe used it). The longest first makes running out of memory show at once.
    """
    megabatch = max(1, min(len(order) // (group_size * 4), _MEGABATCH)) * group_size
    groups = [order[start : start + megabatch] for start in range(0, len(order), megabatch)]
    groups = [group[np.argsort(-lengths[group], kind="stable")] for group in groups]
    longest = int(np.argmax([lengths[group[0]] for group in groups]))
    groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
    return np.concatenate(groups)


def shard(
    samples: npt.NDArray[np.int64], *, rank: int, world_size: int, micro_size: int
) -> npt.NDArray[np.int64]:
    """One rank's part of a global batch.

    Returns:
        Indices of shape ``(accumulation, micro_size)``. At any world size the ranks' rows, taken
        accumulation step by accumulation step and rank by rank, are the global batch in order.
    """
    return samples.reshape(-1, world_size, micro_size)[:, rank]


def longest_micro_batch(
    schedule: SampleSchedule,
    lengths: npt.NDArray[np.int64],
    *,
    begin: int,
    end: int,
    micro_size: int,
    padded: bool,
    check: Callable[[], None] = lambda: None,
) -> npt.NDArray[np.int64]:
    """The forward pass with most tokens between two positions.

    Args:
        schedule: The order.
        lengths: Tokens of each sequence.
        begin: The first position, a multiple of ``micro_size``.
        end: One after the last, another multiple.
        micro_size: Sequences in a forward pass.
        padded: Whether sequences are padded to the longest beside them.

        check: Called now and then; what it raises ends the search.

    Returns:
        Its sequences, int64 of shape ``(micro_size,)``; among equals one whose lengths differ, as
        attention then needs a mask.
    """
    # More than this no forward pass can have; one that joins two epochs may have a sequence twice.
    bound = int(lengths.max()) * micro_size
    most, found = -1, np.empty(0, np.int64)
    step = max(1, _AT_ONCE // micro_size) * micro_size
    end = min(
        end, begin + _SEARCHED_EPOCHS * schedule.num_samples // micro_size * micro_size + step
    )
    for start in range(begin, end, step):
        check()
        rows = schedule.samples(start, min(step, end - start)).reshape(-1, micro_size)
        each = lengths[rows]
        sizes = each.max(axis=1) * micro_size if padded else each.sum(axis=1)
        # Twice the size, and one more for a mask.
        ranks = 2 * sizes + (each.min(axis=1) < each.max(axis=1))
        place = int(ranks.argmax())
        if ranks[place] > most:
            most, found = int(ranks[place]), rows[place]
        if most > 2 * bound or (most == 2 * bound and micro_size == 1):
            break
    return found


def make_schedule(spec: RunSpec, corpus: Corpus) -> SampleSchedule:
    """The order that a spec asks for."""
    return SampleSchedule(
        corpus.num_sequences,
        seed=spec.seed,
        lengths=corpus.lengths if spec.data.group_by_length else None,
        group_size=spec.batch.global_size,
    )


def corpus_facts(spec: RunSpec, corpus: Corpus) -> CorpusFacts:
    """Count a tokenised corpus, and how much of its batches is padding."""
    useful = 1.0
    micro_size = spec.batch.micro_size
    if attention_of(spec) != "varlen" and micro_size > 1:
        batches = min(_MEASURED_BATCHES, -(-corpus.num_sequences // spec.batch.global_size))
        # A whole number of micro-batches, whatever is asked for; at most an epoch's.
        count = min(batches * spec.batch.global_size, corpus.num_sequences) // micro_size
        order = make_schedule(spec, corpus).samples(0, max(1, count) * micro_size)
        lengths = corpus.lengths[order].reshape(-1, micro_size)
        useful = float(lengths.sum() / (lengths.max(axis=1) * micro_size).sum())
    return CorpusFacts(
        num_samples=corpus.num_samples,
        num_sequences=corpus.num_sequences,
        num_tokens=int(corpus.lengths.sum()),
        useful=useful,
    )
