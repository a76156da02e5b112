"""A checkpoint's tensors on disk: written from where they lie in memory, read slice by slice."""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfumato.device import pinned, synchronize
from sfumato.engine import published
from sfumato.errors import UserError

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What safetensors calls a number's format."""


class Saved:
    """A checkpoint on disk, read by (kind, parameter, start, length)."""

    def __init__(self, path: Path) -> None:
        """Open what lies in a folder. Raises Damaged, as far as the manifest, names and sizes tell."""
        self.path, self.state = path, published.read_manifest(path)
        if wrong := [*published.shallow(path, self.state["files"])]:
            raise published.Damaged(path, "; ".join(wrong))
        try:
            files = [safe_open(path / name, "pt") for name in self.state["files"]]
        except (OSError, SafetensorError) as error:
            raise published.Damaged(path, str(error)) from None
        self.step: int = self.state["step"]
        self.position: int = self.state["position"]
        """Global batches that the run had consumed."""
        self.parameters: dict[str, list[int]] = self.state["parameters"]
        self.kinds: set[str] = set()
        self._parts: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for file in files:
            for key in file.keys():
                kind, name, start = key.split("/")
                self.kinds.add(kind)
                self._parts.setdefault((kind, name), []).append((int(start), file, key))

    def problems(self, rank: int = 0, world: int = 1) -> list[str]:
        """What is wrong with it by the sums of its files, of which this rank reads one in `world`."""
        return [*published.deep(self.path, self.state["files"], (rank, world))]

    def export_problems(self, rank: int = 0, world: int = 1) -> list[str]:
        """What is wrong with its export's weights, likewise; users may change the texts beside them."""
        told: dict[str, Any] = self.state["export"]
        weights = {name: entry for name, entry in told.items() if name.endswith(".safetensors")}
        return [*published.deep(self.path / "export", weights, (rank, world))]

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of a flattened parameter's weight or state, (length,)."""
        out = torch.empty(length)
        found = 0
        for first, file, key in self._parts.get((kind, name), []):
            part = file.get_slice(key)
            size = part.get_shape()[0]
            low, high = max(start, first), min(start + length, first + size)
            if low < high:
                out[low - start : high - start] = part[low - first : high - first]
                found += high - low
        if found != length:
            raise UserError(
                f"{kind} of {name} in {self.path}", f"{found} of {length} numbers", "use another checkpoint"
            )
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole weight or state in its own shape, fp32."""
        shape = self.parameters[name]
        return self.read(kind, name, 0, torch.Size(shape).numel()).view(shape)


def write(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write contiguous CPU tensors as safetensors and sync the file; what a manifest says of it.

    The numbers go to the disk from where they lie, without a copy in memory, and their sum is taken from
    memory: what a disk makes of them is seen when they are loaded. OSError where they cannot be written.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    known = hashlib.sha256()
    numbers: Iterator[Any] = (t.view(torch.uint8).numpy() for t in tensors.values() if t.numel())
    with file.open("wb") as out:
        for piece in (struct.pack("<Q", len(text)), text, *numbers):
            known.update(piece)
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    return {"size": 8 + len(text) + end, "sha256": known.hexdigest()}


class Memory:
    """CPU memory for copies of a rank's tensors: made for the first, used again for those after it.

    It is the memory of files where a folder for them is given, so that the system may write it to their disk.
    """

    CHUNK = 2**28
    """Bytes that are taken at once: pinned memory comes in powers of two."""

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.device, self.folder = device, folder
        self.layout: dict[str, tuple[int, torch.dtype]] = {}
        self.copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def fill(
        self, layout: Mapping[str, tuple[int, torch.dtype]], tensors: Iterable[tuple[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Copies of 1-D tensors that come one after the other, complete when this returns.

        layout: name -> their numbers and format. The next call writes over the copies. RuntimeError where
        there is no memory for them.
        """
        if not layout.items() <= self.layout.items():
            self.copies, self.layout = {}, {}
            self.copies = self._take(layout)
            self.layout = dict(layout)
        # From a disk's page a tensor comes in memory that is used again at once, so it is waited for.
        for name, tensor in tensors:
            self.copies[name].copy_(tensor, non_blocking=self.folder is None)
        synchronize(self.device)
        return {name: self.copies[name] for name in layout}

    def _take(self, layout: Mapping[str, tuple[int, torch.dtype]]) -> dict[str, Tensor]:
        """Room for tensors, several in one chunk."""
        chunks: list[dict[str, tuple[int, int]]] = []
        used = self.CHUNK
        for name, (count, dtype) in layout.items():
            size = count * dtype.itemsize
            if used + size > self.CHUNK:
                chunks.append({})
                used = 0
            chunks[-1][name] = (used, size)
            used += -(-size // 64) * 64
        found = {}
        for chunk in chunks:
            room = self._room(sum(-(-size // 64) * 64 for _, size in chunk.values()))
            for name, (begin, size) in chunk.items():
                found[name] = room[begin : begin + size].view(layout[name][1])
        return found

    def _room(self, size: int) -> Tensor:
        if self.folder is not None:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="copy-") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk would kill the process later
                return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
        room = torch.empty(size, dtype=torch.uint8)
        return room if self.device.type == "cpu" else pinned(room)
