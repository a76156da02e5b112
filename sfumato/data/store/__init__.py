"""Content-addressed tensors on disk: what encoders gave, found by a key of all that it depends on.

    FOLDER/shards/*.safetensors   records, a few thousand a file, each tensor named KEY.NAME
    FOLDER/table-HASH.npy, .json  where each record lies; made from the shards' headers
    FOLDER/uses/NAME.json, .npy   which keys somebody needs

A shard appears whole, by one rename, and never changes, so any number of processes and machines may write and
read at once. On a network file system, prune only while no other machine reads: a process that has mapped a
file dies when it is removed from elsewhere.
"""

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.data.store import lookup, uses
from sfumato.data.store.lookup import Shard
from sfumato.data.store.merging import set_aside, table_of
from sfumato.data.store.pruning import needed, plan
from sfumato.data.store.tensors import DTYPES, KEY_BYTES, Damaged, Lying, nbytes
from sfumato.data.store.uses import Use
from sfumato.data.store.writer import SHARD_BYTES, SHARDS, SUFFIX, Writer
from sfumato.errors import UserError

__all__ = ["Store", "Use", "Writer", "key_of"]

USES = "uses"
MAPS = 256  # shards that a process keeps mapped; the tensors that it holds keep theirs besides


def key_of(*parts: object) -> bytes:
    """The key of what is made from `parts`, 16 bytes: BLAKE2b-128 of an encoding that no other parts have.

    A part is a str, int, float, bytes, None or a tuple of such, and nothing else: True is not 1. It is
    encoded as its type's letter (s i f b n t), its length as 8 bytes, least first, and its text: UTF-8,
    decimal digits, Python's repr of a float, the bytes as they are, nothing, or for a tuple its parts'
    encodings, the length being their number. All parts together are encoded as a tuple.
    """
    return blake2b(encoded(parts), digest_size=KEY_BYTES).digest()


def encoded(part: object) -> bytes:
    """One part of a key."""
    if type(part) is tuple:
        return b"t" + len(part).to_bytes(8, "little") + b"".join(map(encoded, part))
    if part is None:
        letter, text = b"n", b""
    elif type(part) is str:
        # File names may have bytes that are not UTF-8, which Python keeps as lone surrogates.
        letter, text = b"s", part.encode("utf-8", "surrogatepass")
    elif type(part) is int:
        letter, text = b"i", b"%d" % part
    elif type(part) is float:
        letter, text = b"f", repr(part).encode()
    else:
        assert type(part) is bytes, f"a key cannot depend on {part!r}, a {type(part).__name__}"
        letter, text = b"b", part
    return letter + len(text).to_bytes(8, "little") + text


class Store:
    """The records in a folder, as they were at the last `refresh`. Sent to loader processes by pickle."""

    def __init__(self, folder: Path, tell: Callable[[str], None] | None = None, maps: int = MAPS) -> None:
        """tell: hears of shards that are set aside; None: a Python warning. Raises UserError as `refresh`."""
        self.folder, self.told, self.maps = Path(folder), tell, maps
        self.table = lookup.empty(self.folder)
        self.mapped: OrderedDict[str, Tensor] = OrderedDict()  # name of a shard -> its bytes, (size,) uint8
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "maps": self.maps,
            "stem": self.table.stem if self.table.shards else "",
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self.told, self.maps = state["folder"], None, state["maps"]
        self.mapped = OrderedDict()
        found = lookup.load(self.folder, state["stem"]) if state["stem"] else None
        self.table = found or lookup.empty(self.folder)
        if state["stem"] and found is None:
            self.refresh()

    def tell(self, message: str) -> None:
        """Warn of something that the user should know and need not mend."""
        if self.told is None:
            warnings.warn(message, stacklevel=3)
        else:
            self.told(message)

    def listing(self) -> dict[str, int]:
        """The shards that lie there, name -> bytes."""
        shards = {}
        try:
            with os.scandir(self.folder / SHARDS) as entries:
                for entry in entries:
                    if entry.name.endswith(SUFFIX) and entry.name[0] != "." and entry.is_file():
                        with suppress(FileNotFoundError):
                            shards[entry.name] = entry.stat().st_size
        except FileNotFoundError:
            pass
        except OSError as error:
            do = "set data.store to a folder that you may read"
            raise UserError(f"the store {self.folder}", f"{error.strerror}: {error.filename}", do) from error
        return shards

    def refresh(self) -> None:
        """See the shards that were published meanwhile, and no more those that are gone.

        The table of these shards is opened if it lies there, else it is made, which costs reading the new
        shards' headers and writing the table: of many processes let one refresh first. A network file system
        may show what other machines published only after some seconds. Raises UserError if the store cannot
        be read, or the table not written.
        """
        listing = self.listing()
        if listing != self.table.sizes:
            self.table = table_of(self.folder, listing, self.table, self.tell)
            for name in self.mapped.keys() - self.table.sizes.keys():
                self.mapped.pop(name)

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Whether the store has each of the keys (n, 16) uint8: (n,) bool. Reads a few pages a key."""
        found = [there for _, there in self.table.find(keys)]
        return np.concatenate(found) if found else np.zeros(0, bool)

    def get(self, key: bytes) -> dict[str, Tensor]:
        """A record: views of the mapped shard, not to be written to, as others share them.

        Raises KeyError if it is not there and UserError, which names the shard, if that is damaged.
        """
        for _ in range(2):
            try:
                tensors = {tensor.name: self.view(shard, tensor) for shard, tensor in self.table.record(key)}
            except FileNotFoundError:
                self.refresh()  # a prune has put the record into another shard, or taken it away
            except Damaged:
                self.table.remove()
                self.table = lookup.empty(self.folder)
                self.refresh()
            else:
                if tensors:
                    return tensors
                break
        raise KeyError(key.hex())

    def view(self, shard: Shard, tensor: Lying) -> Tensor:
        """A tensor of a shard; no copy, unless another program wrote it to an odd place."""
        flat = self.bytes_of(shard)[tensor.offset : tensor.offset + nbytes(tensor)]
        dtype = DTYPES[tensor.dtype][1]
        if tensor.offset % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).view(tensor.shape)

    def bytes_of(self, shard: Shard) -> Tensor:
        """A shard (size,) uint8, mapped. Raises FileNotFoundError, or UserError for a damaged one."""
        data = self.mapped.pop(shard.name, None)
        if data is None:
            path = self.folder / SHARDS / shard.name
            size = path.stat().st_size
            do = "start what fills the store again: the shard is set aside and its records are made anew"
            if size != shard.size:
                found = f"it has {size:,} bytes and was written with {shard.size:,}"
                raise UserError(f"a record of the shard {path}", found, do)
            try:
                # A private mapping: no descriptor stays open, and writing to a view does not reach the file.
                storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
            except RuntimeError as error:
                path.stat()
                raise UserError(f"a record of the shard {path}", f"it cannot be read: {error}", do) from error
            data = torch.empty(0, dtype=torch.uint8).set_(storage)
        self.mapped[shard.name] = data
        while len(self.mapped) > self.maps:
            self.mapped.popitem(last=False)
        return data

    def writer(self, owner: str, shard_bytes: int = SHARD_BYTES) -> Writer:
        """Publishes records, `shard_bytes` a shard; owner: who writes, such as "rank3".

        A context manager. This store sees them after `refresh`.
        """
        return Writer(self.folder / SHARDS, owner, shard_bytes)

    def size(self) -> tuple[int, int]:
        """How many records there are, and the bytes of their shards."""
        return self.table.records, sum(self.table.sizes.values())

    def prune(self, keep: Iterable[np.ndarray]) -> tuple[int, int]:
        """Free all records but those with the keys of `keep`, arrays (n, 16) uint8; how many, and the bytes.

        A shard without a needed record goes, and one of which less than half is needed is written anew; from
        others nothing is freed. Needed records are there at every instant, and who has a shard mapped keeps
        it. What was set aside as damaged goes too. Raises UserError if there is no room to write one anew.
        """
        self.refresh()
        table = self.table
        planned = plan(table, keep)
        shards = self.folder / SHARDS
        freed = self.remove([table.shards[number].name for number in planned.drop])
        freed += self.remove([path.name for path in shards.glob("*.damaged")])
        copied: list[str] = []
        with self.writer("prune") as writer:
            for number in planned.rewrite:
                name = table.shards[number].name
                try:
                    for key in needed(shards / name, table, planned.kept, number):
                        writer.add(key, self.get(key))
                except Damaged as error:
                    set_aside(shards / name, str(error), self.tell)
                except (FileNotFoundError, KeyError):
                    continue  # somebody else prunes, too
                else:
                    copied.append(name)
                if writer.gathered > writer.shard_bytes // 2:
                    writer.publish()
                    freed += self.remove(copied)
                    copied = []
            writer.publish()
            freed += self.remove(copied)
        self.refresh()
        return planned.freed, freed - writer.written

    def remove(self, names: Iterable[str]) -> int:
        """Remove files of the shards' folder that are there; how many bytes that frees. Raises UserError."""
        freed = 0
        for name in names:
            path = self.folder / SHARDS / name
            try:
                size = path.stat().st_size
                path.unlink()
                freed += size
            except FileNotFoundError:
                continue
            except OSError as error:
                do = "see that you may write to its folder"
                raise UserError(f"to remove {path}", f"{error.strerror}", do) from error
            self.mapped.pop(name, None)
        return freed

    def note_use(self, name: str, keys: np.ndarray, facts: Mapping[str, Any]) -> None:
        """Write down which keys (n, 16) uint8 the use `name` needs, in place of those that it had.

        facts: who that is, as JSON can have it. Raises UserError if it cannot be written.
        """
        uses.note(self.folder / USES, name, keys, facts)

    def uses(self) -> Iterator[Use]:
        """Every use, by name. Raises UserError for one that cannot be read."""
        return uses.noted(self.folder / USES)

    def drop_use(self, name: str) -> None:
        """Forget a use; nothing if there is none. Its records stay until `prune`."""
        uses.drop(self.folder / USES, name)
