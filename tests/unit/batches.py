"""Loaders for the tests, and what it means that two of them give the same."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch

from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.data.buckets import Cells
from sfumato.data.cached import Cached
from sfumato.data.index import Index, open_index
from sfumato.data.loader import Loader

Make = Callable[..., Loader]


def opened(config: Config) -> tuple[Index, Cells]:
    """What a run opens of its data."""
    index = open_index(config.data, digests=config.data.cache in ("images", "both"))
    return index, Cells.build(index.folder, config.data, index.sizes, index.part, len(index.parts))


def make(
    config: Config,
    rank: int = 0,
    world: int = 1,
    kind: type[Loader] = Loader,
    cached: Cached | None = None,
) -> Loader:
    """A loader for latents of 4 channels, 8 pixels each."""
    return kind(config, *opened(config), 4, 8, cached, rank, world)


def steps(loader: Loader, begin: int, number: int) -> list[list[Batch]]:
    """Some steps' micro-batches; the workers end with it."""
    stream = loader.steps_from(begin)
    try:
        return list(islice(stream, number))
    finally:
        stream.close()  # type: ignore[attr-defined]


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch's tensors by name."""
    plain = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    drawn = {name: value for name, value in vars(batch.draws).items() if value is not None}
    return plain | drawn


def samples(batches: list[list[Batch]]) -> dict[tuple[int, int], list[Any]]:
    """(id, visit) -> everything that a batch says of that sample, as bytes."""
    found = {}
    for batch in (batch for step in batches for batch in step):
        for row, name in enumerate(zip(batch.ids.tolist(), batch.visits.tolist(), strict=True)):
            assert name not in found, f"sample {name} came twice"
            rows = [value[row].numpy().tobytes() for value in tensors(batch).values()]
            found[name] = [*rows, batch.captions[row]]
    return found


def check_equal(one: list[list[Batch]], other: list[list[Batch]]) -> None:
    """Bit for bit the same steps."""
    assert [len(step) for step in one] == [len(step) for step in other], "other numbers of micro-batches"
    for a, b in zip((x for step in one for x in step), (x for step in other for x in step), strict=True):
        assert a.captions == b.captions, "other captions"
        assert tensors(a).keys() == tensors(b).keys()
        for name, value in tensors(a).items():
            assert torch.equal(value, tensors(b)[name]), f"other {name}"


def ids(batches: list[list[Batch]]) -> list[int]:
    return [number for step in batches for batch in step for number in batch.ids.tolist()]
