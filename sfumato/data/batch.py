"""What a training step is a pure function of, besides the weights."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

HOST = ("ids", "visits", "dropped")
"""What a batch holds to be read on the host: asking a device for it would wait for all that it was told."""
GAP = 64
"""Bytes before a tensor of a block at most, so that each begins where vector instructions like it."""


class Fault(NamedTuple):
    """A record that could not be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch's samples, drawn by the loader; latents are (c, h, w)."""

    posterior: Tensor
    """(B, c, h, w) fp32, N(0, 1): picks a latent from the VAE's Gaussian; 0 picks its mean."""
    noise: Tensor
    """(B, c, h, w) fp32, N(0, 1): the diffusion noise."""
    timestep: Tensor
    """(B,) fp32, uniform in [0, 1): the objective turns it into a timestep."""
    offset: Tensor
    """(B, c, 1, 1) fp32, N(0, 1): noise that is constant over a channel."""
    perturbation: Tensor | None
    """(B, c, h, w) fp32, N(0, 1): noise of the input alone; None where it is not asked for."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Draws":
        """The same draws with every tensor changed."""
        extra = None if self.perturbation is None else change(self.perturbation)
        return Draws(
            change(self.posterior), change(self.noise), change(self.timestep), change(self.offset), extra
        )


@dataclass(frozen=True)
class Batch:
    """The samples of one micro-batch, all of one size. Pixels or moments are there, whichever is at hand."""

    ids: Tensor
    """(B,) int64: the samples' numbers in the index."""
    visits: Tensor
    """(B,) int64: how often each came before."""
    captions: list[str]
    """B captions, as each visit draws them; those of dropped samples are not used."""
    dropped: Tensor
    """(B,) bool: the samples that train the unconditional model."""
    size_and_crop: Tensor
    """(B, 6) fp32, pixels: original height, width, crop top, left, target height, width."""
    draws: Draws
    pixels: Tensor | None = None
    """(B, 3, H, W) fp32 in [-1, 1]; None where the moments are read from the cache."""
    moments: Tensor | None = None
    """(B, 2c, h, w): mean and log-variance of the VAE's Gaussian, or (B, c, h, w): its mean alone."""
    text: dict[str, Tensor] | None = None
    """The encoded captions, B rows each, dropped ones in place; None where they are not cached."""
    hint: Tensor | None = None
    """(B, 3, H, W) fp32 in [0, 1]: the conditioning images, cut as the pixels are."""
    share: Tensor | None = None
    """(B,) fp32: how many times each sample's loss counts in the mean over the global batch; None: once."""
    faults: tuple[Fault, ...] = ()
    """Records that could not be read; others stand in for them, with the randomness that was theirs."""

    def weighed(self, losses: Tensor) -> Tensor:
        """The losses (B,), each as often as it counts."""
        return losses if self.share is None else losses * self.share

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        text = None if self.text is None else {name: change(rows) for name, rows in self.text.items()}
        changed: Any = {name: change(value) for name, value in plain.items()}
        return replace(self, **changed, text=text, draws=self.draws.map(change))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device, see `moved`; from pinned memory the copy does not wait."""
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def moved(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch, changed but for what is read of it on the host (HOST), which stays as it is.

        change: copies a tensor. Where all lies in one block, as `packed` has it, it is called once, and once
        for each of `text`, which the backward pass may need when all else is free again.
        """
        tensors, kept = named(self), {name: getattr(self, name) for name in HOST}
        block = block_of(tensors)
        if block is None:
            return replace(self.map(change), **kept)
        begins = {name: tensor.storage_offset() * tensor.itemsize for name, tensor in tensors.items()}
        text = min((begin for name, begin in begins.items() if name.startswith("text/")), default=len(block))
        copied = change(block[:text])
        for name, tensor in tensors.items():
            if name.startswith("text/"):
                tensors[name] = change(tensor)
                continue
            part = copied[begins[name] : begins[name] + tensor.nbytes]
            tensors[name] = part.view(tensor.dtype).view(tensor.shape)
        return rebuilt(tensors | kept, Words(self.captions, self.faults, self.text is not None))


class Words(NamedTuple):
    """What a batch holds beside tensors."""

    captions: list[str]
    faults: tuple[Fault, ...]
    encoded: bool
    """Whether it has `text`, which may be empty."""


def named(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch by a name: "ids", "draws.noise", "text/NAME"."""
    found = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    found |= {f"draws.{name}": value for name, value in vars(batch.draws).items() if value is not None}
    return found | {f"text/{name}": value for name, value in (batch.text or {}).items()}


def block_of(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The bytes, (n,) uint8, of the one block of the host's that tensors fill, but for gaps; None without."""
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    filled = sum(tensor.nbytes + GAP for tensor in tensors.values())
    first = storages[0]
    if any(other.data_ptr() != first.data_ptr() for other in storages) or first.nbytes() > filled:
        return None
    if first.device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors.values()):
        return None
    return torch.empty(0, dtype=torch.uint8).set_(first)


def rebuilt(tensors: Mapping[str, Tensor], words: Words) -> Batch:
    """The batch whose tensors `named` has named."""
    own = dict(tensors)
    drawn: Any = {field.name: own.pop(f"draws.{field.name}", None) for field in fields(Draws)}
    text = {name[5:]: own.pop(name) for name in [*own] if name.startswith("text/")}
    rest: dict[str, Any] = {"text": text if words.encoded else None, "faults": words.faults, **own}
    return Batch(captions=words.captions, draws=Draws(**drawn), **rest)


def save(batches: Sequence[Batch], path: Path) -> None:
    """Write micro-batches into one safetensors file, every number as it is; OSError if there is no room.

    A tensor is called "2/ids", "2/draws.noise" or "2/text/NAME", after its micro-batch.
    """
    tensors: dict[str, Tensor] = {}
    words = []
    for micro, batch in enumerate(batches):
        own = {name: value.detach().cpu().contiguous() for name, value in named(batch).items()}
        tensors |= {f"{micro}/{name}": value for name, value in own.items()}
        words.append({"captions": batch.captions, "faults": batch.faults, "text": batch.text is not None})
    save_file(tensors, path, {"words": json.dumps(words)})


def read(path: Path) -> list[Batch]:
    """The micro-batches that `save` wrote. Raises SafetensorError or OSError if the file is damaged."""
    with safe_open(path, "pt") as file:
        words = json.loads(file.metadata()["words"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    batches = []
    for micro, said in enumerate(words):
        start = f"{micro}/"
        own = {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)}
        faults = tuple(Fault(*fault) for fault in said["faults"])
        batches.append(rebuilt(own, Words(said["captions"], faults, said["text"])))
    return batches
