"""How tensors lie in a shard: an ordinary safetensors file, each named KEY.NAME with the key in hexadecimal.

A shard is read as something that anyone may have written: nothing in its header counts that the file does not
bear out.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

assert sys.byteorder == "little", "safetensors are little-endian, and so are the views of them"

KEY_BYTES = 16
DIMS = 4
HEADER_BYTES = 16 * 2**20  # a full shard of 4096 records has less than 2 MiB
NAME = re.compile(r"\.[\w./-]{1,64}", re.ASCII)
# Tables have the numbers of these: a new one goes to the end.
DTYPES: tuple[tuple[str, torch.dtype], ...] = (
    ("BOOL", torch.bool),
    ("U8", torch.uint8),
    ("I8", torch.int8),
    ("F8_E5M2", torch.float8_e5m2),
    ("F8_E4M3", torch.float8_e4m3fn),
    ("I16", torch.int16),
    ("U16", torch.uint16),
    ("F16", torch.float16),
    ("BF16", torch.bfloat16),
    ("I32", torch.int32),
    ("U32", torch.uint32),
    ("F32", torch.float32),
    ("F64", torch.float64),
    ("I64", torch.int64),
    ("U64", torch.uint64),
)
NUMBERS = {code: number for number, (code, _) in enumerate(DTYPES)}
CODES = {dtype: code for code, dtype in DTYPES}
ROW = np.dtype(
    [
        ("key", f"S{KEY_BYTES}"),
        ("offset", "<u8"),  # bytes from the beginning of the shard
        ("shape", "<u4", (DIMS,)),
        ("shard", "<u4"),  # its number among the table's shards
        ("name", "<u2"),  # its number among the table's names
        ("dtype", "u1"),  # its number in DTYPES
        ("dims", "u1"),
    ]
)


class Damaged(ValueError):
    """A file of the store that is not what was published; the text says why."""


class Blob(NamedTuple):
    """A tensor on its way to a shard."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Lying(NamedTuple):
    """A tensor as it lies in a shard."""

    key: bytes
    name: str
    dtype: int
    """Its number in DTYPES."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""


def blob(tensor: Tensor) -> Blob:
    """A copy of a tensor of up to four dimensions, from any device."""
    assert tensor.dtype in CODES, f"a store holds no {tensor.dtype}"
    assert tensor.ndim <= DIMS, f"a store holds no shape {tuple(tensor.shape)}"
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return Blob(CODES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def grain(blob: Blob) -> int:
    """The largest power of two, up to 8, that divides its bytes."""
    size = len(blob.data)
    return min(size & -size, 8) if size else 8


def encode(records: Mapping[bytes, Mapping[str, Blob]]) -> tuple[bytes, list[bytes]]:
    """The header of a shard and what follows it, piece by piece.

    Records keep their order, except that what would shift the others off their alignment comes last.
    """
    blobs = [(f"{key.hex()}.{name}", one) for key, named in records.items() for name, one in named.items()]
    blobs.sort(key=lambda pair: -grain(pair[1]))
    header, end = {}, 0
    for name, one in blobs:
        start, end = end, end + len(one.data)
        header[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [one.data for _, one in blobs]


def read(path: Path) -> tuple[int, list[str], np.ndarray]:
    """A shard's size in bytes, the names of its tensors, sorted, and their rows (n,) ROW, as they lie in it.

    In the rows the shard's number is 0. Raises Damaged if the header or the size is wrong, and OSError if the
    file cannot be read.
    """
    with path.open("rb") as file:
        # Asked of the open file: a network file system may show a size that it had while it was written.
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise Damaged(f"a header of {length:,} bytes in a file of {size:,}")
        text = file.read(length)
    try:
        names, rows = parse(text, size - 8 - length)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise Damaged(f"its header is wrong: {type(error).__name__}: {str(error)[:200]}") from None
    rows["offset"] += np.uint64(8 + length)
    return size, names, rows


def parse(text: bytes, room: int) -> tuple[list[str], np.ndarray]:
    """Names and rows of a header that `room` bytes follow. Raises what `read` turns into Damaged."""
    header = json.loads(text.decode())
    header.pop("__metadata__", None)
    hexadecimal = "".join(title[: 2 * KEY_BYTES] for title in header)
    keys = bytes.fromhex(hexadecimal)
    if keys.hex() != hexadecimal or len(keys) != KEY_BYTES * len(header):
        raise ValueError("the name of a tensor does not begin with a key")
    endings = [title[2 * KEY_BYTES :] for title in header]
    numbers = {ending: number for number, ending in enumerate(sorted(set(endings)))}
    if wrong := [ending for ending in numbers if not NAME.fullmatch(ending)]:
        raise ValueError(f"the name KEY{wrong[0][:80]} of a tensor")
    places = [facts["data_offsets"] for facts in header.values()]
    if set(map(len, places)) - {2}:
        raise ValueError("data_offsets that are not two")
    spans = whole(list(chain.from_iterable(places))).reshape(-1, 2)
    rows, lengths = kinds([(facts["dtype"], tuple(facts["shape"])) for facts in header.values()])
    rows["key"] = np.frombuffer(keys, ROW["key"])
    rows["name"] = [numbers[ending] for ending in endings]
    rows["offset"] = spans[:, 0]
    order = np.lexsort((spans[:, 1], spans[:, 0]))
    spans, lengths = spans[order], lengths[order]
    due = np.concatenate(([0], spans[:, 1]))  # each begins where the one before it ends
    if (spans[:, 0] != due[:-1]).any() or (spans[:, 1] - spans[:, 0] != lengths).any():
        raise ValueError("a tensor whose place is not that of its shape and of those before it")
    if due[-1] != room:
        raise ValueError(f"its tensors have {due[-1]:,} bytes, and {room:,} are there")
    return [ending[1:] for ending in numbers], rows[order]


def kinds(told: list[tuple[str, tuple[int, ...]]]) -> tuple[np.ndarray, np.ndarray]:
    """For dtypes and shapes of a header: rows (n,) ROW that have them, and the tensors' bytes (n,) int64."""
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(told))}
    rows, lengths = np.zeros(len(numbers), ROW), np.zeros(len(numbers), np.int64)
    for (dtype, shape), number in numbers.items():
        if len(shape) > DIMS or whole(shape).min(initial=0) < 0:
            raise ValueError(f"the shape {str(shape)[:80]}")
        code = NUMBERS[dtype]
        rows[number] = (b"", 0, (*shape, 0, 0, 0, 0)[:DIMS], 0, 0, code, len(shape))
        lengths[number] = prod(shape) * DTYPES[code][1].itemsize
    which = [numbers[kind] for kind in told]
    return rows[which], lengths[which]


def whole(values: Sequence[int]) -> np.ndarray:
    """Values of JSON as int64. Raises ValueError or OverflowError where one is something else."""
    if set(map(type, values)) - {int}:
        raise ValueError("a number that is not whole")
    return np.array(values, np.int64)


def nbytes(tensor: Lying) -> int:
    """How many bytes it takes in the shard."""
    return prod(tensor.shape) * DTYPES[tensor.dtype][1].itemsize
