"""A run's samples, as they lie in its store."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt

from qlora_dist.data.store import Store
from qlora_dist.data.tokens import Sample


@dataclass(frozen=True)
class Corpus:
    """Training sequences and held-out samples.

    A sequence is one sample or, with packing, several.

    Attributes:
        store: Where they lie.
        max_validation: Only the first so many of the held-out samples are used; None: all.
    """

    store: Store
    max_validation: int | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences in an epoch."""
        offsets = self.store.arrays.get("pack_offsets")
        return len(self.store.arrays["train"]) if offsets is None else len(offsets) - 1

    @property
    def num_samples(self) -> int:
        """Samples in an epoch; a weight counts them as often as they come."""
        return len(self.store.arrays["train"])

    def documents(self, sequence: int) -> list[Sample]:
        """Samples of a training sequence, in their order."""
        arrays = self.store.arrays
        if "pack_offsets" not in arrays:
            return [self._sample(int(arrays["train"][sequence]))]
        first, end = arrays["pack_offsets"][sequence : sequence + 2]
        members = arrays["pack_members"][first:end]
        return [self._sample(int(number)) for number in arrays["train"][members]]

    @property
    def train(self) -> Sequence[Sample]:
        """Samples to train on, packed or not."""
        return _Samples(self, self.store.arrays["train"])

    @property
    def validation(self) -> Sequence[Sample]:
        """Samples held out."""
        return _Samples(self, self.store.arrays["validation"][: self.max_validation])

    @cached_property
    def num_validation_targets(self) -> int:
        """Target tokens of the samples held out."""
        numbers = self.store.arrays["validation"][: self.max_validation]
        return int(self.store.arrays["targets"][numbers].sum())

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each training sequence, int64 of shape ``(sequences,)``."""
        return self._per_sequence(np.diff(self.store.arrays["offsets"]))

    @cached_property
    def targets(self) -> npt.NDArray[np.int64]:
        """Target tokens of each training sequence, int64 of shape ``(sequences,)``."""
        return self._per_sequence(self.store.arrays["targets"])

    def _per_sequence(self, per_sample: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        arrays = self.store.arrays
        values: npt.NDArray[np.int64] = per_sample[arrays["train"]].astype(np.int64)
        if "pack_offsets" not in arrays:
            return values
        sums = np.add.reduceat(values[arrays["pack_members"]], arrays["pack_offsets"][:-1])
        return np.asarray(sums, np.int64)

    def _sample(self, number: int) -> Sample:
        arrays = self.store.arrays
        first, end = arrays["offsets"][number : number + 2]
        source_cut, target_cut = arrays["cuts"][number].tolist()
        # Copies: a tensor over a read-only map would be one that nobody may write to.
        ids, learned = (np.array(arrays[name][first:end]) for name in ("tokens", "learned"))
        return Sample(ids, learned, source_cut, target_cut)


class _Samples(Sequence[Sample]):
    """Samples by their numbers, read when they are asked for."""

    def __init__(self, corpus: Corpus, numbers: npt.NDArray[np.int64]) -> None:
        self._corpus, self._numbers = corpus, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> "_Samples": ...

    def __getitem__(self, index: int | slice) -> "Sample | _Samples":
        if isinstance(index, slice):
            return _Samples(self._corpus, self._numbers[index])
        return self._corpus._sample(int(self._numbers[index]))
