"""What an encoder is: a hash of the files that it is read from and of how it computes."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

READ = {".json", ".txt", ".model", ".safetensors"}
SAMPLES, SAMPLE = 33, 16_384
"""What `sampled` reads of a file: how many parts, and the bytes of each."""


def fingerprint(folders: Sequence[Path], said: Iterable[Any]) -> str:
    """Hash of the files of some parts' folders, by name and content, and of the words in `said`.

    Takes a second per gigabyte or so. All weights of a folder count, also a variant that is not read: then
    too much is encoded anew, never too little.
    """
    total = hashlib.blake2b(digest_size=16)
    for folder in folders:
        for path in sorted(path for path in folder.iterdir() if path.suffix in READ):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "blake2b").hexdigest()
            total.update(f"{folder.name}/{path.name}/{content}\n".encode())
    total.update(repr([str(word) for word in said]).encode())
    return total.hexdigest()


def sampled(files: Iterable[Path]) -> str:
    """Hash of files by size and samples of their content, whatever they are called; takes milliseconds.

    Of JSON what it says counts, without what libraries note about themselves. Enough to tell one model from
    another; a few changed numbers may be missed.
    """
    total = hashlib.blake2b(digest_size=16)
    for path in files:
        if path.suffix == ".json":
            said = json.loads(path.read_text(encoding="utf-8"))
            said = {name: value for name, value in said.items() if not name.startswith("_")}
            total.update(json.dumps(said, sort_keys=True).encode())
            continue
        size = path.stat().st_size
        total.update(f"{size}\n".encode())
        with path.open("rb") as file:
            for number in range(SAMPLES):
                file.seek(number * max(0, size - SAMPLE) // (SAMPLES - 1))
                total.update(file.read(SAMPLE))
    return total.hexdigest()
