"""What a validation asks the denoiser about: records, noise levels, noise and conditions, always the same."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato import run
from sfumato.config import Config, Tags
from sfumato.data import draws
from sfumato.data.batch import Batch, Draws
from sfumato.data.buckets import Cells
from sfumato.data.cached import Cached
from sfumato.data.captions import caption
from sfumato.data.held import Held, Point
from sfumato.data.samples import Samples
from sfumato.data.transforms import geometry
from sfumato.drawing.draw import share
from sfumato.engine.ranks import Ranks
from sfumato.errors import UserError
from sfumato.methods import Method
from sfumato.models.latents import check_finite
from sfumato.models.texts import Condition

SEED = 0
"""In place of the run's, so that runs of other seeds can be compared."""
TOLD, WITHOUT_TEXT, WITHOUT_IMAGE = "loss", "null_loss", "hint_loss"
"""The conditions: everything, the null text in place of the caption, and a black second image."""


class Encoded(NamedTuple):
    """A record as the denoiser is asked about it; on the CPU."""

    latents: Tensor
    """(1, c, h, w) fp32: the mean of the VAE's Gaussian, of the middle of the picture."""
    condition: Condition
    null: Condition
    """What of the condition is another one without the text."""


class Points:
    """The records of a validation, encoded, as far as this rank's forward passes need them."""

    def __init__(self, config: Config, held: Held, cells: Cells, method: Method, place: Ranks) -> None:
        """All ranks together. Raises UserError on all of them for a record that one cannot read or encode."""
        assert config.validation is not None, "no validation is asked for"
        self.levels, self.held, self.method = config.validation.quantiles, held, method
        # A record is shown as it is; the caption is one of its own, always the same.
        plain = {"caption_dropout": 0.0, "tags": Tags(), "views": None, "cache": "none"}
        self.data = held.data.model_copy(update=plain)
        asked, family = config.model_copy(update={"data": self.data}), method.family
        self.channels, self.factor = family.latent_channels, family.vae_factor
        self.samples = Samples(asked, held.index, cells, self.channels, self.factor, None)
        groups = held.groups(self.levels, config.micro_batch_size)
        turns = share(len(groups), place.rank, place.world)
        self.mine = [(groups[turn % len(groups)], turn < len(groups)) for turn in turns]
        """This rank's forward passes, and whether each counts: what fills up does not."""
        self.records: dict[int, Encoded] = {}
        run.together(place, self.encode)

    @staticmethod
    def of(
        config: Config, held: Held | None, cells: Cells, method: Method, cached: Cached | None, place: Ranks
    ) -> "Points | None":
        """Those of a plan, if it has a validation; encoders are let go again that a cache stands in for."""
        if held is None:
            return None
        points = Points(config, held, cells, method, place)
        if cached is not None:
            parts = {"vae": cached.images, "text_encoders": cached.captions}
            if unneeded := [part for part, stored in parts.items() if stored is not None]:
                method.family.release(*unneeded)
        return points

    def encode(self) -> None:
        """Encode this rank's records, one at a time: what comes out depends on no other."""
        for place in sorted({point.record for group, _ in self.mine for point in group}):
            self.records[place] = self.encoded(place)

    def encoded(self, place: int) -> Encoded:
        """One record. Raises UserError if it cannot be read, or the VAE cannot encode it."""
        batch = self.batch(place)
        latents, condition = self.method.encode(batch)
        check_finite(latents, batch.ids, str(self.method.family.vae_dtype).removeprefix("torch."))
        _, null = self.method.encode(replace(batch, dropped=torch.tensor([True])))
        other = {name: rows.cpu() for name, rows in null.items() if not torch.equal(rows, condition[name])}
        return Encoded(latents.cpu(), {name: rows.cpu() for name, rows in condition.items()}, other)

    def batch(self, place: int) -> Batch:
        """A record as a batch of one: the middle of the picture, a caption, and no randomness."""
        number, key = int(self.held.numbers[place]), int(self.held.keys[place])
        record, size = self.held.index.record(number), self.size(place)
        cut = geometry(record.size, size, None, flip=False)
        try:
            pixels = self.samples.image(number, record, cut)
            hint = self.samples.hint(number, record, cut) if self.samples.hints else None
        except (UserError, OSError) as error:
            found = error.found if isinstance(error, UserError) else str(error)
            raise UserError(f"validation on {record.name}", found, "mend it, or take it away") from error
        still = torch.zeros(1, self.channels, size[0] // self.factor, size[1] // self.factor)
        return Batch(
            ids=torch.tensor([number]),
            visits=torch.tensor([0]),
            captions=[caption(self.data, record.captions, record.weights, SEED, key, 0)],
            dropped=torch.tensor([False]),
            size_and_crop=torch.tensor([cut.six], dtype=torch.float32),
            draws=Draws(still, still, torch.zeros(1), still[:, :, :1, :1], None),
            pixels=pixels[None],
            hint=None if hint is None else hint[None],
        )

    def size(self, place: int) -> tuple[int, int]:
        """Height and width that a record is looked at."""
        height, width = self.held.sizes[place].tolist()
        return height, width

    def inputs(self, group: Sequence[Point]) -> tuple[Tensor, Tensor, dict[str, Condition]]:
        """Latents and noise (B, c, h, w) of a group, and the conditions to be asked under, by their names."""
        rows = [self.records[point.record] for point in group]
        latents = torch.cat([row.latents for row in rows])
        noise = torch.stack([self.noise(point, tuple(latents.shape[1:])) for point in group])
        told = [row.condition for row in rows]
        asked = {TOLD: joined(told), WITHOUT_TEXT: joined([row.condition | row.null for row in rows])}
        if "hint" in asked[TOLD]:
            asked[WITHOUT_IMAGE] = asked[TOLD] | {"hint": torch.zeros_like(asked[TOLD]["hint"])}
        return latents, noise, asked

    def noise(self, point: Point, shape: tuple[int, ...]) -> Tensor:
        """The noise (c, h, w) of a record at a level: a function of its name and the level."""
        key = int(self.held.keys[point.record])
        return torch.from_numpy(draws.normal(SEED, key, point.level, draws.HELD, shape))

    def steps(self, timesteps: int) -> list[int]:
        """The timestep of each level: the middles of equal parts of the schedule."""
        return [(2 * level + 1) * timesteps // (2 * self.levels) for level in range(self.levels)]


def joined(conditions: Sequence[Condition]) -> Condition:
    """Conditions of B = 1 as one."""
    return {name: torch.cat([one[name] for one in conditions]) for name in conditions[0]}
