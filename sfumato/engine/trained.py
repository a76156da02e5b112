"""What a checkpoint's users load: its weights, an average that it holds, or one of any width.

That one is made from averages that the run kept: the snapshots in averages/, and those in its checkpoints.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.config import Config
from sfumato.engine import profiles, published
from sfumato.engine.profiles import Kept
from sfumato.engine.saved import Saved
from sfumato.errors import UserError


class Weights(Mapping[str, Tensor]):
    """A run's parameters, read when they are asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self.names, self.read = frozenset(names), read
        self.unread = set(self.names)

    def __getitem__(self, name: str) -> Tensor:
        self.unread.discard(name)
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)


def pick(
    saved: Saved, config: Config, weights: str | None = None, width: float | None = None
) -> tuple[Weights, dict[str, Any]]:
    """The weights that are exported, and what the export says of them."""
    kept = [kind for kind in profiles.kinds(config.ema) if kind in saved.kinds]
    if width is not None and profiles.kind_of(width) not in kept:
        made = Rebuilt(saved, width)
        told = {"weights": profiles.kind_of(width), "made_of": len(made), "error": float(f"{made.error:.2g}")}
        return Weights(saved.parameters, made.whole), told
    kind = which(weights if width is None else profiles.kind_of(width), kept, saved.path)
    return Weights(saved.parameters, partial(saved.whole, kind)), {"weights": kind}


def which(weights: str | None, kept: Sequence[str], path: Path) -> str:
    """The kind of tensor in a checkpoint that is exported. kept: the averages in it."""
    if weights == "live" or not (weights or kept):
        return "weight"
    if weights in (None, "ema") and kept:
        return kept[0]
    if weights not in kept:
        found = f"it holds {', '.join(kept)}" if kept else "the run keeps none"
        do = "name one of these, or another one's --width" if kept else "export the live weights"
        raise UserError(f"the average {weights} of {path}", found, do)
    return str(weights)


class Rebuilt:
    """The average of a profile up to a checkpoint's step, as weights that are read one by one."""

    def __init__(self, saved: Saved, width: float) -> None:
        """Find out what it is made of; saved: the checkpoint.

        Raises UserError if the run kept too little for that width, or a file is damaged.
        """
        self.width, self.step, self.parameters = width, saved.step, saved.parameters
        asked = f"the average of width {width:g} at step {saved.step:,} of {saved.path.parent.parent}"
        if not 0 < width < 12**-0.5:
            raise UserError(asked, "no profile has that width", "ask for one between 0.01 and 0.28")
        found = {one: file for file in folders(saved) for one in kept_in(file, saved)}
        if not found:
            do = "train with ema.profiles = [0.05, 0.1] and ema.snapshots; --weights names what there is"
            raise UserError(asked, "the run kept no averages of profiles", do)
        mixture = profiles.mixture(width, saved.step, found)
        if mixture.error > profiles.GOOD:
            raise UserError(asked, *too_far(mixture.error, saved.step, list(found)))
        self.error = mixture.error
        """See `profiles.Mixture`."""
        opened = {path: Saved(path) for path in {found[one] for one in mixture.shares}}
        for path, one in opened.items():
            if wrong := one.problems():
                do = f"move {path.name} away; then it is made from the others, if they are enough"
                raise UserError(asked, f"{path} is damaged: {'; '.join(wrong)}", do)
        self._parts = [
            (opened[found[one]], profiles.kind_of(one.width), share) for one, share in mixture.shares.items()
        ]

    def __len__(self) -> int:
        """Of how many averages it is made."""
        return len(self._parts)

    def whole(self, name: str) -> Tensor:
        """A weight in its own shape, summed in float64, as fp32."""
        total = torch.zeros(self.parameters[name], dtype=torch.float64)
        for saved, kind, share in self._parts:
            total.add_(saved.whole(kind, name).double(), alpha=share)
        return total.float()


def folders(saved: Saved) -> Iterator[Path]:
    """Where averages of a checkpoint's run may lie, up to its step; the checkpoint itself last.

    Of one step a later folder counts: a running run deletes its checkpoints, but no snapshot.
    """
    run = saved.path.parent.parent
    for folder in (run / "checkpoints", run / "averages"):
        yield from (
            published.path_of(folder, step) for step in published.steps_in(folder) if step <= saved.step
        )
    yield saved.path


def kept_in(path: Path, saved: Saved) -> list[Kept]:
    """The averages of profiles in a folder; none of one that is damaged, or of other parameters."""
    try:
        there = Saved(path)
    except UserError:
        return []
    widths = [width for kind in there.kinds if (width := profiles.width_of(kind)) is not None]
    return [Kept(width, there.step) for width in widths] if there.parameters == saved.parameters else []


def too_far(error: float, step: int, kept: list[Kept]) -> tuple[str, str]:
    """What is said of a width that cannot be made: what was found, and what can be done."""
    widths = ", ".join(f"{width:g}" for width in sorted({one.width for one in kept}))
    steps = len({one.step for one in kept})
    found = (
        f"from the widths {widths} at {steps} steps it would be {error:.1%} of its distance from the weights "
        f"off, more than {profiles.GOOD:.0%}"
    )
    able = spans(profiles.makeable(step, kept))
    more = "keep more of them in the next run: ema.snapshots"
    return found, f"ask for {able}; or {more}" if able else more


def spans(widths: list[float]) -> str:
    """Hundredths as people say them: 0.03 to 0.07, 0.1."""
    groups: list[list[float]] = []
    for width in widths:
        if groups and round(100 * (width - groups[-1][-1])) == 1:
            groups[-1].append(width)
        else:
            groups.append([width])
    return ", ".join(f"{g[0]:g} to {g[-1]:g}" if len(g) > 1 else f"{g[0]:g}" for g in groups)
