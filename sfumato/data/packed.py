"""A micro-batch as one block of memory: what a worker process hands over.

Every tensor that comes from a process takes an open file and a handshake, about a millisecond, and a batch
has ten of them. A large block is one; a small one comes through the workers' pipe, as numpy's arrays do.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from sfumato.data.batch import GAP, Batch, Words, named, rebuilt

SMALL = 2**20  # bytes that a pipe takes in less time than a handshake


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the block."""

    start: int
    """Bytes before it."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The byte behind its last one."""
        return self.start + prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Packed:
    """A batch whose tensors lie in one block; whoever opens it gets the batch that was packed, to the bit."""

    block: Tensor | np.ndarray
    """(bytes,) uint8, in memory that processes share or, where it is small, of this process."""
    places: dict[str, Place]
    words: Words

    def pin_memory(self) -> "Packed":
        """The same in page-locked memory; the DataLoader calls this by its name."""
        return Packed(torch.as_tensor(self.block).pin_memory(), self.places, self.words)

    def opened(self, copy: bool) -> Batch:
        """The batch. copy: what lies in shared memory is copied, so that a worker gets that back."""
        block = self.block.clone() if copy and isinstance(self.block, Tensor) else torch.as_tensor(self.block)
        tensors = {
            name: block[place.start : place.end].view(place.dtype).view(place.shape)
            for name, place in self.places.items()
        }
        return rebuilt(tensors, self.words)


def packed(batch: Batch) -> Packed:
    """A batch on the CPU, copied into one block."""
    tensors, places, end = named(batch), dict[str, Place](), 0
    for name, tensor in tensors.items():
        place = Place(-(-end // GAP) * GAP, tuple(tensor.shape), tensor.dtype)
        places[name], end = place, place.end
    block = torch.empty(end, dtype=torch.uint8)
    for name, place in places.items():
        block[place.start : place.end].view(place.dtype).view(place.shape).copy_(tensors[name])
    words = Words(batch.captions, batch.faults, batch.text is not None)
    return Packed(block if end > SMALL else block.numpy(), places, words)
