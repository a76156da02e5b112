"""Which samples make up a step: a pure function of (number of samples, seed, step).

The data is one endless stream of shuffled epochs, cut into global batches, so that an epoch's tail begins
the next one's first batch and no sample is left out or repeated. An epoch's order is never written down:
position -> sample is a keyed permutation, so resuming is a seek and memory does not grow with the data.
"""

from math import isqrt

import numpy as np

from sfumato.data.draws import ORDER, bits

# Measured by chi-square over 24,000 epochs of 3 to 9 samples: from 6 rounds on, and with halves of 8 or more,
# every order is as likely as any other; with halves of 5 or fewer some are not, however many the rounds.
ROUNDS = 8
SMALLEST_HALF = 8


def permuted(positions: np.ndarray, epochs: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The samples that stand at `positions` (k,) of `epochs` (k,), each epoch a permutation of range(count).

    A Feistel network over pairs (left, right) in Z_h x Z_h with h*h >= count; a value that falls outside
    range(count) walks on along its cycle until it is inside (Black & Rogaway, CT-RSA 2002).
    """
    if count == 1:
        return np.zeros_like(positions)  # its walk would take 64 turns
    half = np.uint64(max(isqrt(count - 1) + 1, SMALLEST_HALF))
    names, which = np.unique(epochs, return_inverse=True)
    keys = np.stack([bits(seed, 0, int(epoch), ORDER).random_raw(ROUNDS) for epoch in names])[
        which
    ]  # (k, rounds)
    samples = positions.astype(np.uint64)
    outside = np.arange(len(samples))
    while len(outside):
        samples[outside] = feistel(samples[outside], keys[outside], half)
        outside = outside[samples[outside] >= count]
    return samples.astype(np.int64)


def feistel(values: np.ndarray, keys: np.ndarray, half: np.uint64) -> np.ndarray:
    """Permute range(half * half); values (k,) and keys (k, rounds) are uint64."""
    left: np.ndarray = values // half
    right: np.ndarray = values % half
    for number in range(keys.shape[1]):
        left, right = right, (left + mixed(right ^ keys[:, number]) % half) % half
    return left * half + right


def mixed(values: np.ndarray) -> np.ndarray:
    """Hash uint64 values: the finalizer of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def batch_at(count: int, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The global batch of a step: ids (batch_size,) int64 in range(count) and visits (batch_size,) int64.

    A visit is how often that sample came before, which is the number of its epoch.
    """
    assert count > 0 and batch_size > 0 and step >= 0, f"no batch for {count=} {batch_size=} {step=}"
    places = step * batch_size + np.arange(batch_size, dtype=np.int64)
    visits, positions = np.divmod(places, count)
    return permuted(positions, visits, count, seed), visits


def slice_of(rank: int, world: int, micro: int, micro_batch_size: int) -> slice:
    """The part of a step's global batch that one rank reads as its micro-batch number `micro`."""
    start = (micro * world + rank) * micro_batch_size
    return slice(start, start + micro_batch_size)
