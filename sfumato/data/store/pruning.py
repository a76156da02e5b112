"""What becomes of each shard when only some records are still needed."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sfumato.data.store.lookup import Table
from sfumato.data.store.merging import BLOCK, edges
from sfumato.data.store.tensors import KEY_BYTES, read


class Plan(NamedTuple):
    """The numbers of the shards that go, and of those that are written anew with less; the others stay."""

    drop: list[int]
    rewrite: list[int]
    kept: np.ndarray
    """(rows,) bool: the first row of each record that is needed."""
    freed: int
    """Records that are then nowhere."""


def plan(table: Table, keep: Iterable[np.ndarray]) -> Plan:
    """Keep the records with these keys, arrays (n, 16) uint8: one byte of memory a row of the table.

    A shard of which less than half is needed is written anew. Of copies in several shards one is needed.
    """
    kept = np.zeros(len(table.rows), bool)
    for keys in keep:
        for places, there in table.find(keys):
            kept[places[there]] = True
    records = np.zeros(len(table.shards), np.int64)
    wanted = np.zeros(len(table.shards), np.int64)
    bounds = edges([table.rows], BLOCK)[:, 0]
    pieces = [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if a < b]
    for piece in pieces:
        shard = table.rows["shard"][piece]
        first = changes(table.rows["key"][piece]) | changes(shard)
        records += np.bincount(shard[first], minlength=len(records))
        wanted += np.bincount(shard[kept[piece]], minlength=len(wanted))
    stays = (wanted > 0) & (2 * wanted >= records)
    freed = 0
    for piece in pieces:
        survives = kept[piece] | stays[table.rows["shard"][piece]]
        starts = np.flatnonzero(changes(table.rows["key"][piece]))
        freed += int(np.count_nonzero(~np.logical_or.reduceat(survives, starts)))
    drop = np.flatnonzero(wanted == 0).tolist()
    return Plan(drop, np.flatnonzero((wanted > 0) & ~stays).tolist(), kept, freed)


def needed(path: Path, table: Table, kept: np.ndarray, number: int) -> list[bytes]:
    """The keys of the shard with that number whose records are needed from it, as they lie in it.

    Raises OSError if it cannot be read and Damaged if its header is wrong.
    """
    raw = read(path)[2]["key"].copy().tobytes()
    keys = list(dict.fromkeys(raw[at : at + KEY_BYTES] for at in range(0, len(raw), KEY_BYTES)))
    chosen = []
    for places, there in table.find(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)):
        places = np.where(there, places, 0)
        chosen.append(there & kept[places] & (table.rows["shard"][places] == number))
    return [key for key, stays in zip(keys, np.concatenate(chosen), strict=True) if stays]


def changes(values: np.ndarray) -> np.ndarray:
    """(n,) bool: whether each differs from the one before it; the first does."""
    return np.concatenate(([True], values[1:] != values[:-1]))
