"""How a table is made: merged from the last one and new shards' headers, in memory that does not grow."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np

from sfumato.data.store.lookup import VERSION, Shard, Table, empty, fingerprint, load, newest, retire
from sfumato.data.store.tensors import ROW, Damaged, read
from sfumato.data.store.writer import SHARDS, published, room, sweep
from sfumato.errors import UserError

Tell = Callable[[str], None]

BLOCK = 2**19  # rows that are merged at a time
RUN = 2**20  # new rows that are sorted at a time
NAMES = 2**16


def table_of(folder: Path, listing: Mapping[str, int], last: Table, tell: Tell) -> Table:
    """The table of the shards of a listing, name -> bytes: one that lies there, or `last` and what is new.

    A damaged shard is set aside and told. Raises UserError if a shard cannot be read or no table written.
    """
    if not listing:
        return empty(folder)
    if found := load(folder, fingerprint(listing)):
        return found
    sweep(folder)
    try:
        table = merged(folder, listing, last if last.shards else newest(folder), tell)
    except Damaged:
        table = merged(folder, listing, empty(folder), tell)
    retire(folder, table.stem)
    return table


def merged(folder: Path, listing: Mapping[str, int], base: Table, tell: Tell) -> Table:
    """A new table from `base` and the headers of shards that it lacks. Raises Damaged if base is no good."""
    fresh = sorted(name for name, size in listing.items() if base.sizes.get(name) != size)
    with room(folder, base.rows.nbytes), TemporaryFile(dir=folder) as scratch:
        shards, names = list(base.shards), list(base.names)
        ends = np.cumsum([0, *gathered(sound(folder, fresh, set(names), tell), shards, names, scratch)])
        new: Any = np.memmap(scratch, ROW, "r") if ends[-1] else np.empty(0, ROW)
        runs = [base.rows, *(np.asarray(new[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True))]
        first = len(base.shards)
        stay = [n for n, shard in enumerate(shards) if n >= first or listing.get(shard.name) == shard.size]
        stay.sort(key=lambda number: shards[number].name)
        table = Table(folder, [shards[number] for number in stay], np.empty(0, ROW), 0)
        if not stay:
            return table
        if found := load(folder, table.stem):
            return found
        numbers = np.full(len(shards), -1)
        numbers[stay] = np.arange(len(stay))
        places = {name: number for number, name in enumerate(table.names)}
        write(table, renumbered(runs, numbers, np.array([places.get(name, 0) for name in names], np.int64)))
    made = load(folder, table.stem)
    assert made is not None, f"{table.stem} cannot be read right after it was written to {folder}"
    return made


def sound(
    folder: Path, fresh: Iterable[str], names: set[str], tell: Tell
) -> Iterator[tuple[Shard, np.ndarray]]:
    """Each shard that is not damaged, with its rows as `read` gives them; `names`: of tensors, known already.

    Raises UserError if a shard cannot be read.
    """
    for name in fresh:
        path = folder / SHARDS / name
        try:
            size, found, rows = read(path)
            more = names.union(found)
            if len(more) > NAMES:
                raise Damaged(f"its tensors and those of other shards have more than {NAMES} names")
        except Damaged as error:
            set_aside(path, str(error), tell)
        except FileNotFoundError:
            continue  # somebody took it away after it was listed
        except OSError as error:
            do = "see that you may read it, or take it away: its records are then made again"
            raise UserError(f"the shard {path}", f"it cannot be read: {error.strerror}", do) from error
        else:
            names = more
            yield Shard(name, size, len(rows), tuple(found)), rows


def set_aside(path: Path, reason: str, tell: Tell) -> None:
    """Rename a damaged shard, so that nobody counts on it, and say so."""
    aside = path.with_name(f"{path.name}.damaged")
    # A folder that is someone else's: the shard is left out all the same.
    with suppress(OSError):
        path.replace(aside)
    tell(
        f"the shard {path} is damaged: {reason}. It is set aside as {aside.name}; its records are made again."
    )


def gathered(
    found: Iterable[tuple[Shard, np.ndarray]], shards: list[Shard], names: list[str], scratch: IO[bytes]
) -> list[int]:
    """Write the rows of new shards to `scratch`, in runs that are sorted by key; the runs' lengths.

    The shards and their tensors' names are appended to those that are there; rows number both in this order.
    """
    numbers = {name: number for number, name in enumerate(names)}
    waiting: list[np.ndarray] = []
    lengths: list[int] = []

    def flush() -> None:
        rows = np.concatenate(waiting)
        rows = rows.take(np.lexsort((rows["name"], rows["shard"], rows["key"])))
        scratch.write(rows.view(np.uint8).data)
        lengths.append(len(rows))
        waiting.clear()

    for shard, rows in found:
        places = [numbers.setdefault(name, len(numbers)) for name in shard.names]
        rows["name"] = np.array(places, np.uint16)[rows["name"]]
        rows["shard"] = len(shards)
        shards.append(shard)
        waiting.append(rows)
        if sum(map(len, waiting)) >= RUN:
            flush()
    if waiting:
        flush()
    scratch.flush()
    names[:] = numbers
    return lengths


def edges(runs: list[np.ndarray], block: int) -> np.ndarray:
    """Where to cut sorted runs, so that pieces of about `block` rows can be merged each by itself.

    (pieces + 1, runs) int64: piece p has the rows edges[p] to edges[p + 1] of the runs, and all of a key's.
    """
    step = max(1, block // len(runs))
    marks = np.sort(np.concatenate([run["key"][::step] for run in runs]))  # each stands for `step` rows
    cuts = np.unique(marks[block // step :: block // step])
    return np.stack([np.array([0, *np.searchsorted(run["key"], cuts), len(run)]) for run in runs], axis=1)


def renumbered(runs: list[np.ndarray], shards: np.ndarray, names: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of all runs, merged, with new numbers of shards and names; a shard with number -1 goes.

    Raises Damaged for a row whose numbers cannot be.
    """
    bounds = edges(runs, BLOCK)
    for starts, ends in zip(bounds[:-1], bounds[1:], strict=True):
        rows = np.concatenate([run[a:b] for run, a, b in zip(runs, starts, ends, strict=True)])
        if not len(rows):
            continue
        if rows["shard"].max() >= len(shards) or rows["name"].max() >= len(names):
            raise Damaged("a row of the table is out of its bounds")
        shard = shards[rows["shard"]]
        rows = rows.compress(shard >= 0)
        rows["shard"] = shard.compress(shard >= 0)
        rows["name"] = names[rows["name"]]
        yield ordered(rows)


def ordered(rows: np.ndarray) -> np.ndarray:
    """Rows sorted by key, shard and name; fast where they come in few runs that are."""
    # numpy takes whole rows by `take` and `compress`, five times as fast as by an index.
    rows = rows.take(np.argsort(rows["key"], kind="stable"))
    second = rows["shard"].astype(np.uint64) << np.uint64(16) | rows["name"]
    tied = rows["key"][1:] == rows["key"][:-1]
    if (tied & (second[1:] < second[:-1])).any():
        rows = rows.take(np.lexsort((second, rows["key"])))
    return rows


def write(table: Table, blocks: Iterable[np.ndarray]) -> None:
    """Publish the files of a table. Raises Damaged for rows that are unsorted, too few or too many."""
    total = sum(shard.rows for shard in table.shards)
    written, records, last = 0, 0, b""
    path = table.folder / f"{table.stem}.npy"
    with published(path, total * ROW.itemsize) as file:
        described = np.lib.format.dtype_to_descr(ROW)
        facts = {"descr": described, "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(file, facts)
        for rows in blocks:
            keys = rows["key"]
            if len(rows) and keys[0] < last:
                raise Damaged("rows that are not sorted")
            last = keys[-1] if len(rows) else last
            records += int(np.count_nonzero(keys[1:] != keys[:-1])) + min(1, len(rows))
            written += len(rows)
            file.write(rows.view(np.uint8).data)
        if written != total:
            raise Damaged(f"{written} rows where the shards have {total}")
    text = json.dumps({"version": VERSION, "records": records, "shards": table.shards})
    with published(path.with_suffix(".json"), len(text)) as file:
        file.write(text.encode())
