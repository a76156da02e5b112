"""Batches of which the prior's samples are half, and how much the loss of each sample counts."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from sfumato.data.order import Chosen, Order


class Halves:
    """The samples of every step, of which each second one is the prior's.

    Both halves have an order of their own: that of the others is the one of a run without prior and with half
    the batch. Taking turns, they are equally many in every micro-batch of even size.
    """

    def __init__(
        self, counts: np.ndarray, repeats: Sequence[Fraction], batch_size: int, seed: int, prior: int
    ) -> None:
        """counts, repeats, batch_size and seed: see Order. prior: the number of its part."""
        assert batch_size % 2 == 0 and len(counts) == 1, f"{batch_size=}, {len(counts)} buckets"
        # Of all parts, so that the prior's has a key of its own and the two are not shuffled alike.
        mine = np.arange(counts.shape[1]) == prior
        self.orders = [
            Order(np.where(held, counts, 0), repeats, batch_size // 2, seed) for held in (~mine, mine)
        ]

    def batch_at(self, step: int) -> Chosen:
        """The global batch of a step."""
        pair = [order.batch_at(step) for order in self.orders]
        rows = [
            np.stack([getattr(half, name) for half in pair], axis=1).reshape(-1)  # (B,)
            for name in ("part", "member", "visit")
        ]
        return Chosen(0, *rows)


def shares(part: np.ndarray, prior: int, weight: float) -> np.ndarray:
    """How many times each sample of a global batch counts (B,) fp32, from the parts (B,) of all of them.

    The mean over the batch of share * loss is then the mean over the instances plus `weight` times the mean
    over the prior's samples (DreamBooth, arXiv:2208.12242, equation 2), however the batch is cut.
    """
    mine = part == prior
    held, total = int(np.count_nonzero(mine)), len(part)
    assert 0 < held < total, f"{held} samples of the prior among {total}"
    return np.where(mine, weight * total / held, total / (total - held)).astype(np.float32)
