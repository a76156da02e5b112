"""Weights of words: which tokens they reach, what they do to the encoding, and nothing where all are 1."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.drawing import emphasis, pipelines
from sfumato.drawing.draw import draw
from sfumato.drawing.request import Sampling, shots
from sfumato.drawing.words import encoded, encoders_of
from sfumato.errors import UserError
from tests.unit import twins

HOW = Sampling(steps=2, guidance=5.0, size=32)
LONG = "a red fox beside a house " * 13  # 78 tokens
Toy = tuple[Any, Any]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A pipeline and its family with a window of 150 tokens."""
    folder: Path = tmp_path_factory.mktemp("toy") / request.param
    twins.write(request.param, folder)
    return pipelines.open_pipeline(folder, "cpu", torch.float32, 150)


def test_weights_lie_on_their_tokens(toy: Toy) -> None:
    tokenizer = toy[0].tokenizer
    pieces = emphasis.parse("a (red:1.5) fox, [two words]")
    found = emphasis.token_weights(tokenizer, pieces, 1)
    assert found.shape == (77,)
    assert found[:9].tolist() == pytest.approx([1, 1, 1.5, 1, 1, 1 / 1.1, 1 / 1.1, 1, 1])
    # In the second window, whose first place is its begin.
    found = emphasis.token_weights(tokenizer, emphasis.parse(f"{LONG.strip()} (storm:2)"), 2)
    assert found.nonzero().numel() == 154 and (found == 2).nonzero().flatten().tolist() == [77 + 1 + 3]
    cut = emphasis.token_weights(tokenizer, emphasis.parse(f"{LONG.strip()} (storm:2)"), 1)
    assert (cut == 1).all(), "a word that is not read has a weight"
    with pytest.raises(UserError, match="within a word"):
        emphasis.token_weights(tokenizer, emphasis.parse("wonder(ful:2)"), 1)


def check_mean(weighted: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The words' states are in the ratio of their weights, and the mean is what it was."""
    hidden = torch.randn(77, 8, generator=torch.Generator().manual_seed(0)) + 0.3
    weights = torch.ones(77)
    weights[3] = 1.5
    found = weighted(hidden, weights)
    torch.testing.assert_close(found.mean(), hidden.mean())
    ratio = (found / hidden).mean(1)
    torch.testing.assert_close(ratio[3] / ratio[4], torch.tensor(1.5))
    assert weighted(hidden, torch.ones(77)) is hidden


def test_the_mean_is_restored() -> None:
    check_mean(emphasis.weighted)
    centred = torch.randn(77, 8)
    centred -= centred.mean()
    weights = torch.ones(77)
    weights[3] = 1.5
    assert torch.equal(emphasis.weighted(centred, weights), centred * weights[:, None]), "scaled by rounding"


def test_mean_catches_weights_alone() -> None:
    with pytest.raises(AssertionError):
        check_mean(lambda hidden, weights: hidden * weights[:, None])


def check_equal(toy: Toy, encode: Callable[[Toy, str], dict[str, Tensor]]) -> None:
    """Weights of 1 are no weights, to the bit; others reach the context and leave the pooled text."""
    plain = encoded(toy[0], ["a red fox"], toy[1], False)
    one = encode(toy, "a (red:1.0) fox")
    assert all(torch.equal(one[name], plain[name]) for name in plain), "a weight of 1 changes something"
    strong = encode(toy, "a (red:1.5) fox")
    assert not torch.equal(strong["context"], plain["context"]), "the weight is ignored"
    if "pooled" in plain:
        assert torch.equal(strong["pooled"], plain["pooled"])
    widths = [width for _, width in encoders_of(toy[0])]
    for part, was in zip(
        strong["context"][0].split(widths, -1), plain["context"][0].split(widths, -1), strict=True
    ):
        ratio = (part / was).nanmedian(1).values
        torch.testing.assert_close(ratio[2] / ratio[3], torch.tensor(1.5), atol=1e-3, rtol=0)


def test_weights_reach_every_encoder(toy: Toy) -> None:
    check_equal(toy, lambda toy, prompt: encoded(toy[0], [prompt], toy[1], True))


def test_equal_catches_ignored_weights(toy: Toy) -> None:
    def broken(toy: Toy, prompt: str) -> dict[str, Tensor]:
        return encoded(toy[0], [emphasis.plain(emphasis.parse(prompt))], toy[1], False)

    with pytest.raises(AssertionError, match="ignored"):
        check_equal(toy, broken)


def test_pictures_with_and_without_weights(toy: Toy) -> None:
    """Off unless asked: brackets are then letters. With weights of 1 the picture is the plain one."""

    def pixels(prompt: str, weights: bool, negative: str = "rain") -> bytes:
        found = draw(toy[0], shots([prompt], [1]), HOW, family=toy[1], emphasis=weights)
        return np.asarray(found[0].image).tobytes()

    plain, letters = pixels("a red fox", False), pixels("a (red:1.0) fox", False)
    assert pixels("a (red:1.0) fox", True) == plain != letters
    assert pixels("a (red:9) fox", True) != plain


def test_a_context_of_other_encoders_is_refused(toy: Toy) -> None:
    context = torch.zeros(1, 154, 99)
    with pytest.raises(UserError, match="its context has the width 99"):
        emphasis.weigh(context, [[("a", 1.0)]], encoders_of(toy[0]))
