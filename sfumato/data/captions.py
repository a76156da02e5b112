"""The caption of one visit: which of a record's, what becomes of its tags, and what is put around it."""

from collections.abc import Sequence

import numpy as np

from sfumato.config import Data
from sfumato.data import draws


def caption(data: Data, texts: Sequence[str], weights: Sequence[float], seed: int, id: int, view: int) -> str:
    """The text of a record's view, drawn from the record's own randomness.

    texts: the record's captions, at least one. weights: one for each, or none where all count alike.
    """
    choice = chosen(weights, len(texts), draws.uniform(seed, id, view, draws.CAPTION))
    text = texts[choice]
    if data.tags.shuffle or data.tags.dropout:
        text = tagged(data, text, draws.generator(seed, id, view, draws.TAGS))
    return f"{data.caption_prefix}{text}{data.caption_suffix}"


def chosen(weights: Sequence[float], count: int, u: float) -> int:
    """One of `count` captions, by their weights, from u in [0, 1)."""
    if not weights:
        return draws.pick(u, count)
    sums = np.cumsum(weights)
    return min(int(np.searchsorted(sums, u * sums[-1], side="right")), count - 1)


def tagged(data: Data, text: str, random: np.random.Generator) -> str:
    """A list of tags with those after the kept ones left out and shuffled as [data.tags] says."""
    tags, rule = [tag.strip() for tag in text.split(data.tags.separator)], data.tags
    kept, rest = tags[: rule.keep], tags[rule.keep :]
    # As many numbers are drawn whatever the settings, so that one of them does not change the other's draws.
    stays, order = random.random(len(rest)) >= rule.dropout, random.permutation(len(rest))
    if not rule.shuffle:
        order = np.arange(len(rest))
    return f"{rule.separator.rstrip()} ".join([*kept, *(rest[n] for n in order if stays[n])])


def possible(data: Data, texts: Sequence[str], weights: Sequence[float], seed: int, id: int) -> set[str]:
    """Every text that a record's visits can have; all of them only if that is a finite, foreseeable number.

    Where tags are drawn, data.views says how many there are.
    """
    if data.views is not None:
        return {caption(data, texts, weights, seed, id, view) for view in range(data.views)}
    assert not data.tags.shuffle and not data.tags.dropout, "each visit draws its tags anew"
    return {f"{data.caption_prefix}{text}{data.caption_suffix}" for text in texts}
