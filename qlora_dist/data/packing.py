"""Several samples into one sequence: best fit, longest first."""

from collections import defaultdict

import numpy as np
import numpy.typing as npt


def best_fit(
    lengths: npt.NDArray[np.int64], *, capacity: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Put samples into as few sequences as best-fit decreasing does.

    The longest sample goes first, each into the fullest sequence that still has room for it. At
    most 11/9 of the least possible number of sequences are opened (D. S. Johnson, 1973).

    Args:
        lengths: Tokens of each sample, int64 of shape ``(samples,)``, each in 1..capacity.
        capacity: Most tokens of a sequence.

    Returns:
        ``(offsets, members)``: sequence ``i`` holds the samples
        ``members[offsets[i] : offsets[i + 1]]``, in the order in which they were put in. int64 of
        shapes ``(sequences + 1,)`` and ``(samples,)``.

    Raises:
        ValueError: A length is less than 1 or over the capacity.
    """
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"lengths must be in 1..{capacity}")
    order = np.argsort(-lengths, kind="stable")
    # Open sequences by the room that they have left, and a bit for each room that occurs: its
    # lowest set bit from a length on is the best fit.
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0
    sequence_of = np.empty(len(lengths), np.int64)
    count = 0
    for position, length in enumerate(lengths[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequences = by_room[room]
            sequence = sequences.pop()
            if not sequences:
                rooms ^= 1 << room
        else:
            room, sequence = capacity, count
            count += 1
        left = room - length
        if left:
            if not by_room[left]:
                rooms |= 1 << left
            by_room[left].append(sequence)
        sequence_of[position] = sequence
    # Stable, so that a sequence's members stay in the order of their lengths.
    members = order[np.argsort(sequence_of, kind="stable")]
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(sequence_of, minlength=count), out=offsets[1:])
    return offsets, members
