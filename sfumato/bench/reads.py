"""What was encoded before training, read back: our store, and `datasets` with nested lists.

Diffusers' SDXL example keeps latents and embeddings as nested lists in a table of `datasets` and turns them
into tensors in its collation. It also decodes its pictures again at every visit; that is left out here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.bench.sides import Side, side_by_side
from sfumato.config import Config
from sfumato.data import draws
from sfumato.data.batch import Batch
from sfumato.data.buckets import Cells
from sfumato.data.cached import Cached
from sfumato.data.index import open_index
from sfumato.data.samples import Samples, Wanted
from sfumato.data.store import Store

BATCH = 4
SCALING = 0.13025  # of SDXL's latents
NEAR = 1e-5  # the same fp32 sums in another order
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PICTURE = 16  # side in pixels; nobody looks at what is in them


@dataclass(frozen=True)
class Shape:
    """What is kept of each record, such as SDXL's."""

    side: int
    """Pixels; a latent is (4, side / 8, side / 8)."""
    tokens: int
    width: int
    """A text is (tokens, width)."""
    pooled: int

    @property
    def latent(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return 4, self.side // 8, self.side // 8


class Encoded:
    """Made-up moments and texts by record: numbers that bf16 can hold, so that no side rounds any."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def of(self, number: int) -> dict[str, Tensor]:
        """moments (8, h, w), context (tokens, width) and pooled (pooled,), fp32."""
        draw = torch.Generator().manual_seed(number)
        channels, *area = self.shape.latent
        shapes = {
            "moments": (2 * channels, *area),
            "context": (self.shape.tokens, self.shape.width),
            "pooled": (self.shape.pooled,),
        }
        return {name: torch.randn(size, generator=draw).bfloat16().float() for name, size in shapes.items()}

    def latent(self, moments: Tensor, number: int) -> Tensor:
        """A sample (4, h, w) fp32 of the moments' Gaussian, as training at visit 0 draws it."""
        noise = torch.from_numpy(draws.normal(0, number, 0, draws.POSTERIOR, self.shape.latent))
        mean, logvar = moments.float().chunk(2)
        return (mean + (0.5 * logvar).exp() * noise) * SCALING


def pictures(folder: Path, count: int) -> None:
    """A folder of so many pictures with captions, no two alike."""
    folder.mkdir()
    for number in range(count):
        colour = number % 256, number // 256 % 256, number // 65536
        Image.new("RGB", (PICTURE, PICTURE), colour).save(folder / f"{number:06}.png")
        (folder / f"{number:06}.txt").write_text(f"a photo of the thing with number {number}")


def config_of(folder: Path, shape: Shape) -> Config:
    """A run over these pictures, everything cached."""
    data = {
        "source": str(folder / "pictures"),
        "store": folder / "store",
        "resolution": shape.side,
        "center_crop": True,
        "cache": "both",
    }
    return Config.model_validate(
        {
            "steps": 1,
            "batch_size": BATCH,
            "micro_batch_size": BATCH,
            "model": {"weights": "none"},
            "data": data,
        }
    )


def filled(folder: Path, shape: Shape, kind: str) -> Samples:
    """The samples of a run whose store holds everything in a number format."""
    config = config_of(folder, shape)
    index = open_index(config.data, digests=True)
    cells = Cells.build(index.folder, config.data, index.sizes, index.part, len(index.parts))
    cached = Cached(Store(folder / kind), images=kind, captions=kind)
    samples = Samples(config, index, cells, shape.latent[0], 8, cached)
    assert index.digests is not None, "the index has no digests"
    with cached.store.writer("bench") as writer:
        for number in range(len(index)):
            record = index.record(number)
            tensors = {name: rows.to(FORMATS[kind]) for name, rows in Encoded(shape).of(number).items()}
            cut = samples.cut(number, record, 0, cells.sizes[0])
            moments = {"moments": tensors.pop("moments")}
            writer.add(cached.image_key(index.digests[number].tobytes(), cut), moments)
            writer.add(cached.caption_key(record.captions[0]), tensors)
    cached.store.refresh()
    return samples


def whole(samples: Samples, numbers: list[int]) -> Batch:
    """A micro-batch as training gets it: with its captions, its geometry and its random numbers."""
    zeros = np.zeros(len(numbers), np.int64)
    # With one size and one part a record's number in its cell is its number.
    return samples.batch(Wanted(0, zeros, np.array(numbers), zeros))


def tensors_alone(samples: Samples, numbers: list[int]) -> dict[str, Tensor]:
    """A micro-batch's tensors and nothing else."""
    records = [samples.index.record(number) for number in numbers]
    size = samples.cells.sizes[0]
    images = [
        samples.image(number, record, samples.cut(number, record, 0, size))
        for number, record in zip(numbers, records, strict=True)
    ]
    texts = samples.encoded([record.captions[0] for record in records], [False] * len(records))
    return {"moments": torch.stack(images), **texts}


def nested(folder: Path, shape: Shape, count: int) -> Callable[[list[int]], dict[str, Tensor]]:
    """The table of nested lists on disk, and how a batch is read from it."""
    import datasets

    encoded = Encoded(shape)

    def rows(batch: dict[str, list[int]]) -> dict[str, Tensor]:
        several = [encoded.of(number) for number in batch["number"]]
        latents = [
            encoded.latent(one["moments"], number)
            for one, number in zip(several, batch["number"], strict=True)
        ]
        return {
            "model_input": torch.stack(latents),
            "prompt_embeds": torch.stack([one["context"] for one in several]),
            "pooled_prompt_embeds": torch.stack([one["pooled"] for one in several]),
        }

    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.Dataset.from_dict({"number": range(count)}).map(
            rows,
            batched=True,
            batch_size=BATCH,
            cache_file_name=str(folder / "nested.arrow"),
            new_fingerprint="nested",
        )
    finally:
        if bars:
            datasets.enable_progress_bars()

    def read(numbers: list[int]) -> dict[str, Tensor]:
        found = table.__getitems__(numbers)  # as torch's loader asks for a batch
        names = "model_input", "prompt_embeds", "pooled_prompt_embeds"
        return {name: torch.stack([torch.tensor(row[name]) for row in found]) for name in names}

    return read


def sides_of(folder: Path, shape: Shape, count: int) -> list[Side]:
    """Every way; an item is a batch's record numbers."""
    encoded = Encoded(shape)

    def alike(numbers: Sequence[int], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moments = zip(tensors["moments"], numbers, strict=True)
        return {
            "model_input": torch.stack([encoded.latent(*one) for one in moments]),
            "prompt_embeds": tensors["context"],
            "pooled_prompt_embeds": tensors["pooled"],
        }

    def of_batch(numbers: Sequence[int], batch: Batch) -> dict[str, Tensor]:
        assert batch.moments is not None and batch.text is not None, "the batch is not from the cache"
        assert batch.ids.tolist() == list(numbers), f"a batch of {batch.ids.tolist()}, not {numbers}"
        return alike(numbers, {"moments": batch.moments, **batch.text})

    sides = [Side("datasets, nested lists (fp32)", nested(folder, shape, count))]
    for kind in FORMATS:
        samples = filled(folder, shape, kind)
        for name, work, seen in (
            ("tensors alone", tensors_alone, alike),
            ("whole batches", whole, of_batch),
        ):
            sides.append(Side(f"Sfumato, {name} ({kind})", partial(work, samples), seen, NEAR, NEAR))
    return sides


def reading(folder: Path, shape: Shape, count: int, rounds: int) -> dict[str, Any]:
    """Compare and time the reading of `count` records, a multiple of 4, in a shuffled order."""
    assert count % BATCH == 0, f"{count} records in batches of {BATCH}"
    pictures(folder / "pictures", count)
    order = np.random.default_rng(0).permutation(count).reshape(-1, BATCH).tolist()
    what = f"read what was encoded of {shape.side} x {shape.side}, batches of {BATCH}"
    return side_by_side(what, sides_of(folder, shape, count), order, count, rounds)
