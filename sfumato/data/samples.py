"""From numbers of records to the batch that is trained on: read, cut, and drawn for."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sfumato.config import Config, Tags
from sfumato.data import draws
from sfumato.data.batch import Batch, Draws, Fault
from sfumato.data.buckets import Cells
from sfumato.data.cached import Cached
from sfumato.data.captions import caption
from sfumato.data.index import Index, Record
from sfumato.data.transforms import Geometry, decode, geometry, render
from sfumato.errors import UserError

STAND_INS = 32
"""Records that are tried in the place of one that cannot be read."""


class Wanted(NamedTuple):
    """A micro-batch by its numbers."""

    bucket: int
    part: np.ndarray
    """(B,) int64: which part of the data."""
    member: np.ndarray
    """(B,) int64: the record's number in its cell, that is in this part of this bucket."""
    visit: np.ndarray
    """(B,) int64: how often the cell came before."""
    share: np.ndarray | None = None
    """(B,) fp32: see Batch.share."""


@dataclass(frozen=True)
class Sample:
    """One record as a visit shows it."""

    image: Tensor
    """Pixels (3, H, W) in [-1, 1], or moments (2c or c, h, w) where they are cached."""
    hint: Tensor | None
    caption: str
    six: tuple[int, ...]


class Samples(Dataset["Batch | UserError"]):
    """Turns a micro-batch's numbers into its Batch. Holds no state."""

    def __init__(
        self, config: Config, index: Index, cells: Cells, channels: int, factor: int, cached: Cached | None
    ) -> None:
        """channels: of a latent. factor: pixels per latent along a side."""
        self.data, self.seed = config.data, config.seed
        self.index, self.cells, self.cached = index, cells, cached
        self.channels, self.factor = channels, factor
        self.perturbed = config.objective.input_perturbation > 0
        self.images_cached = cached is not None and cached.images is not None
        self.captions_cached = cached is not None and cached.captions is not None
        # What is said around captions is about the instances: it would teach the prior their word.
        plain = self.data.model_copy(update={"caption_prefix": "", "caption_suffix": "", "tags": Tags()})
        self.wording = [plain if part == index.prior else self.data for part in range(len(index.parts))]
        """What is made of captions, for each part."""
        self.hints = any(layout.conditioning_column for layout in config.data.layouts)

    def __getitem__(self, wanted: Wanted) -> Batch | UserError:
        try:
            return self.batch(wanted)
        except UserError as error:
            # torch would wrap a worker's exception into a RuntimeError; a returned one stays itself.
            return error

    def batch(self, wanted: Wanted) -> Batch:
        """Read, cut and draw B samples. Raises UserError where no record of a cell can be read."""
        ids = self.cells.record(wanted.bucket, wanted.part, wanted.member)  # (B,)
        visits = self.cells.visits(wanted.bucket, wanted.visit)  # (B,)
        names = list(zip(ids.tolist(), visits.tolist(), strict=True))
        faults: list[Fault] = []
        samples = [self.sample(wanted, row, visits[row].item(), faults) for row in range(len(names))]
        dropped = [
            draws.uniform(self.seed, *name, draws.DROPOUT) < self.data.caption_dropout for name in names
        ]
        images = torch.stack([sample.image for sample in samples])  # (B, ...)
        hints = [sample.hint for sample in samples if sample.hint is not None]
        assert len(hints) in (0, len(samples)), "some records have a conditioning image, others have none"
        captions = [sample.caption for sample in samples]
        return Batch(
            ids=torch.from_numpy(ids.astype(np.int64)),  # (B,)
            visits=torch.from_numpy(visits.astype(np.int64)),  # (B,)
            captions=captions,
            dropped=torch.tensor(dropped),  # (B,)
            size_and_crop=torch.tensor([sample.six for sample in samples], dtype=torch.float32),  # (B, 6)
            draws=self.drawn(names, self.cells.sizes[wanted.bucket]),
            pixels=None if self.images_cached else images,
            moments=images if self.images_cached else None,
            text=self.encoded(captions, dropped) if self.captions_cached else None,
            hint=torch.stack(hints) if hints else None,
            share=None if wanted.share is None else torch.from_numpy(wanted.share),  # (B,)
            faults=tuple(faults),
        )

    def sample(self, wanted: Wanted, row: int, visit: int, faults: list[Fault]) -> Sample:
        """One sample; where its record cannot be read the next of its cell stands in for it."""
        cell = wanted.bucket, wanted.part[row : row + 1]
        records = int(self.cells.counts[wanted.bucket, wanted.part[row]])
        first = wanted.member[row : row + 1]
        for further in range(min(STAND_INS, records)):
            number = int(self.cells.record(*cell, (first + further) % records)[0])
            try:
                return self.read(number, self.view(visit), self.cells.sizes[wanted.bucket])
            except (UserError, OSError) as error:
                reason = error.found if isinstance(error, UserError) else str(error)
                faults.append(Fault(self.index.name(number), reason))
        raise UserError(
            f"sample {self.index.name(int(self.cells.record(*cell, first)[0]))}",
            f"neither it nor the {further} records that could stand in for it can be read: {reason}",
            "look at the folder: is it still there, and whole?",
        )

    def view(self, visit: int) -> int:
        """Which of its views a visit shows: each its own, or data.views of them in turn."""
        views = self.data.views
        return visit if views is None else visit // len(self.data.resolutions) % views

    def cut(self, number: int, record: Record, view: int, target: tuple[int, int]) -> Geometry:
        """What a view cuts out of a record."""
        down, across = draws.generator(self.seed, number, view, draws.CROP).random(2).tolist()
        flip = self.data.flip and draws.uniform(self.seed, number, view, draws.FLIP) < 0.5
        return geometry(record.size, target, None if self.data.center_crop else (down, across), flip)

    def cuts(self, number: int, record: Record, target: tuple[int, int]) -> set[Geometry]:
        """Every cut that the visits of a record can show, where that is a finite number."""
        if self.data.views is not None:
            return {self.cut(number, record, view, target) for view in range(self.data.views)}
        assert self.data.center_crop, "each visit draws its crop anew"
        flips = (False, True) if self.data.flip else (False,)
        return {geometry(record.size, target, None, flip) for flip in flips}

    def read(self, number: int, view: int, target: tuple[int, int]) -> Sample:
        """A view of a record. Raises UserError or OSError if it cannot be had."""
        record = self.index.record(number)
        cut = self.cut(number, record, view, target)
        text = caption(self.wording[record.part], record.captions, record.weights, self.seed, number, view)
        hint = self.hint(number, record, cut) if self.hints else None
        return Sample(self.image(number, record, cut), hint, text, cut.six)

    def image(self, number: int, record: Record, cut: Geometry) -> Tensor:
        """The pixels (3, H, W) in [-1, 1] of a cut, or its cached moments."""
        if self.images_cached:
            assert self.cached is not None and self.index.digests is not None
            moments = self.cached.moments(self.index.digests[number].tobytes(), cut)
            if moments is None:
                found = "it could not be encoded: see faults/cache-rank-*.jsonl of the run"
                raise UserError(f"the image {record.name}", found, "mend the file, or take it away")
            return moments
        with self.index.open(number) as file:
            picture = decode(file, record.name, cut.resized, self.data.max_pixels)
        if (picture.height, picture.width) not in reductions(record.size):
            found = f"it is of another size than the {record.size[0]} x {record.size[1]} that was indexed"
            raise UserError(f"the image {record.name}", found, "start again; the index is then made anew")
        return render(picture, cut) * 2 - 1

    def hint(self, number: int, record: Record, cut: Geometry) -> Tensor:
        """The conditioning image (3, H, W) in [0, 1], cut as its target is."""
        if record.hint is None:
            found = "it has no conditioning image"
            raise UserError(
                f"the record {record.name}", found, "give it one, or unset data.conditioning_column"
            )
        with self.index.open_hint(number) as file:
            name = f"{record.name} (conditioning image)"
            return render(decode(file, name, cut.resized, self.data.max_pixels), cut)

    def encoded(self, captions: list[str], dropped: list[bool]) -> dict[str, Tensor]:
        """The cached text of B samples, the unconditional one where it is dropped."""
        assert self.cached is not None
        rows = []
        for text, drop in zip(captions, dropped, strict=True):
            found = self.cached.caption(None if drop else text)
            assert found is not None, f"the caption {text!r} was not encoded"
            rows.append(found)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}  # (B, ...)

    def drawn(self, names: list[tuple[int, int]], size: tuple[int, int]) -> Draws:
        """The random numbers of B visits, each from its own streams; size: height and width in pixels."""
        latent = self.channels, size[0] // self.factor, size[1] // self.factor

        def normal(stream: int, shape: tuple[int, ...]) -> Tensor:
            return torch.from_numpy(
                np.stack([draws.normal(self.seed, *name, stream, shape) for name in names])
            )

        times = [draws.generator(self.seed, *name, draws.TIMESTEP).random(dtype=np.float32) for name in names]
        sampled = self.data.posterior == "sample"
        return Draws(
            posterior=normal(draws.POSTERIOR, latent) if sampled else torch.zeros(len(names), *latent),
            noise=normal(draws.NOISE, latent),  # (B, c, h, w)
            timestep=torch.from_numpy(np.array(times, np.float32)),  # (B,)
            offset=normal(draws.OFFSET, (self.channels, 1, 1)),  # (B, c, 1, 1)
            perturbation=normal(draws.PERTURBATION, latent) if self.perturbed else None,  # (B, c, h, w)
        )


def reductions(size: tuple[int, int]) -> list[tuple[int, int]]:
    """The sizes that a picture of (height, width) has when it is decoded at full or reduced scale."""
    return [(-(-size[0] // scale), -(-size[1] // scale)) for scale in (1, 2, 4, 8)]
