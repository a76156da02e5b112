"""Which lines of lists name which files, by hashes of their paths."""

from array import array
from dataclasses import dataclass
from typing import Literal

import numpy as np

SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


@dataclass
class Known:
    """Which lines name which files, by hashes of their paths: 32 bytes a line."""

    keys: np.ndarray
    """(N,) uint64: the image of each line."""
    offsets: np.ndarray
    """(N,) uint64: the byte where the line begins."""
    firsts: list[int]
    """The number of each list's first line."""
    order: np.ndarray
    """(N,) int64: the lines' numbers, those of one image side by side, in their order."""
    sorted: np.ndarray
    """(N,) uint64: the keys in that order."""
    others: np.ndarray
    """(M,) uint64, sorted: files that lines name under another key, such as conditioning images."""

    @classmethod
    def of(
        cls, keys: "array[int]", offsets: "array[int]", firsts: list[int], others: "array[int]"
    ) -> "Known":
        """From what was found line by line, in arrays of 64 bits."""
        hashes, begins, other = (np.asarray(each, np.uint64) for each in (keys, offsets, others))
        order = np.argsort(hashes, kind="stable")
        return cls(hashes, begins, firsts, order, hashes[order], np.unique(other))

    def lines(self, key: int) -> list[int]:
        """The numbers of the lines for an image."""
        begin, end = (np.searchsorted(self.sorted, np.uint64(key), side) for side in SIDES)
        return [int(number) for number in self.order[begin:end]]

    def names(self, key: int) -> bool:
        """Whether a line names a file, as its image or as another thing."""
        places = ((keys, np.searchsorted(keys, np.uint64(key))) for keys in (self.sorted, self.others))
        return any(at < len(keys) and keys[at] == key for keys, at in places)
