"""Which records somebody still needs: lists of keys, by name, so that the rest can be removed.

NAME.json has the facts and says which .npy beside it has the keys: one rename replaces both.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote
from uuid import uuid4

import numpy as np

from sfumato.data.store.tensors import KEY_BYTES
from sfumato.data.store.writer import published, sweep
from sfumato.errors import UserError

CHUNK = 2**20  # keys that are written at a time


@dataclass(frozen=True)
class Use:
    """What one user of a store needs."""

    name: str
    facts: dict[str, Any]
    """As they were noted: who it is."""
    time: float
    """Seconds since 1970 when it was noted."""
    file: Path

    def keys(self) -> np.ndarray:
        """The keys, (n, 16) uint8, memory-mapped. Raises UserError if they cannot be read."""
        try:
            keys: np.ndarray = np.load(self.file, mmap_mode="r", allow_pickle=False)
            if keys.dtype != np.uint8 or keys.shape != (len(keys), KEY_BYTES):
                raise ValueError(f"{keys.shape} {keys.dtype}")
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise unreadable(self.file, self.name, error) from error
        return keys


def unreadable(path: Path, name: str, error: Exception) -> UserError:
    """What a use is that cannot be read: to overlook it would remove what it needs."""
    return UserError(
        f"which records {name} needs, from {path}",
        f"it cannot be read: {error}",
        f"start {name} again, which notes them anew; if it is of no use any more, remove the file",
    )


def place(folder: Path, name: str) -> Path:
    """The file of a use's facts; any name has one, and no other name has the same."""
    return folder / f"{quote(name, safe='').replace('.', '%2E')}.json"


def note(folder: Path, name: str, keys: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Write down the keys (n, 16) uint8 of a use, in place of those that it had. Raises UserError."""
    good = keys.dtype == np.uint8 and keys.ndim == 2 and keys.shape[1] == KEY_BYTES
    assert good, f"keys are (n, {KEY_BYTES}) uint8, not {keys.shape} {keys.dtype}"
    path = place(folder, name)
    file = path.with_name(f"{path.stem}.{uuid4().hex}.npy")
    with published(file, keys.nbytes) as opened:
        header = {"descr": "|u1", "fortran_order": False, "shape": keys.shape}
        np.lib.format.write_array_header_1_0(opened, header)
        for start in range(0, len(keys), CHUNK):
            opened.write(np.ascontiguousarray(keys[start : start + CHUNK]).data)
    text = json.dumps({"keys": file.name, "time": time.time(), "facts": dict(facts)}, indent=1)
    with published(path, len(text)) as opened:
        opened.write(text.encode())
    sweep(folder)
    for old in folder.glob(f"{path.stem}.*.npy"):
        if old != file:
            with suppress(OSError):
                old.unlink()


def noted(folder: Path) -> Iterator[Use]:
    """Every use, by name. Raises UserError for one that cannot be read."""
    for path in sorted(folder.glob("*.json")):
        name = unquote(path.stem)
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            yield Use(name, dict(told["facts"]), float(told["time"]), folder / str(told["keys"]))
        except FileNotFoundError:
            continue  # dropped after it was listed
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise unreadable(path, name, error) from error


def drop(folder: Path, name: str) -> None:
    """Forget a use; nothing if there is none."""
    path = place(folder, name)
    path.unlink(missing_ok=True)
    for file in folder.glob(f"{path.stem}.*.npy"):
        file.unlink(missing_ok=True)
