"""A visit's caption: drawn from the record's own randomness, in the shares that are asked for."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from sfumato.config import Data
from sfumato.data import captions
from sfumato.data.captions import caption, possible


def data(**settings: Any) -> Data:
    return Data(source="x", **settings)


def near(found: int, share: float, number: int) -> bool:
    """Within 4 standard deviations."""
    return abs(found - share * number) < 4 * np.sqrt(number * share * (1 - share)) + 1e-9


def check_shares(weights: tuple[float, ...], shares: tuple[float, ...]) -> None:
    count = 3000
    said = Counter(caption(data(), ["a", "b", "c"], weights, 7, n % 100, n // 100) for n in range(count))
    for text, share in zip("abc", shares, strict=True):
        assert near(said[text], share, count), f"{text}: {said[text]} of {count}, not {share:.0%}"


def test_choice_among_captions() -> None:
    check_shares((), (1 / 3, 1 / 3, 1 / 3))
    check_shares((1, 2, 7), (0.1, 0.2, 0.7))
    check_shares((5, 1e-9, 5), (0.5, 0, 0.5))


def test_choice_catches_weights_that_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = captions.chosen
    monkeypatch.setattr(captions, "chosen", lambda weights, count, u: chosen((), count, u))
    with pytest.raises(AssertionError, match="of 3000"):
        check_shares((1, 2, 7), (0.1, 0.2, 0.7))


def test_around_every_caption() -> None:
    said = caption(data(caption_prefix="a drawing of ", caption_suffix=", white"), ["a cat"], (), 0, 0, 0)
    assert said == "a drawing of a cat, white"
    assert caption(data(caption_prefix="sks "), [""], (), 0, 0, 0) == "sks "


TEXT = "sks, one,two , three ,four, five"


def test_tags_are_shuffled_behind_those_that_are_kept() -> None:
    seen = Counter()
    for view in range(600):
        tags = caption(data(tags={"shuffle": True, "keep": 2}), [TEXT], (), 3, 9, view).split(", ")
        assert tags[:2] == ["sks", "one"] and sorted(tags[2:]) == ["five", "four", "three", "two"]
        seen[tuple(tags)] += 1
    assert len(seen) == 24 and max(seen.values()) < 60, "orders are not alike"


def test_tags_are_left_out_one_by_one() -> None:
    kept = Counter()
    for view in range(1000):
        tags = caption(data(tags={"dropout": 0.3, "keep": 1}), [TEXT], (), 3, 9, view).split(", ")
        assert tags[0] == "sks"
        assert [tag for tag in TEXT.replace(" ", "").split(",") if tag in tags] == tags, "another order"
        kept.update(tags)
    assert all(near(kept[tag], 0.7, 1000) for tag in ("one", "two", "three", "four", "five"))


def test_one_setting_does_not_change_the_others_draws() -> None:
    for view in range(20):
        both = caption(data(tags={"shuffle": True, "dropout": 0.4}), [TEXT], (), 3, 9, view).split(", ")
        alone = caption(data(tags={"shuffle": True}), [TEXT], (), 3, 9, view).split(", ")
        assert [tag for tag in alone if tag in both] == both


def test_another_separator() -> None:
    rule = {"shuffle": True, "separator": "|"}
    assert set(caption(data(tags=rule), ["a, b | c"], (), 0, 0, 1).split("| ")) == {"a, b", "c"}


def test_possible_is_all_that_visits_say() -> None:
    settings = data(tags={"shuffle": True}, views=5, caption_prefix="p ")
    texts = ["a, b, c", "d, e"]
    told = {caption(settings, texts, (), 1, 2, view % 5) for view in range(200)}
    assert told == possible(settings, texts, (), 1, 2) and len(told) <= 5
    plain = data(caption_suffix=".")
    assert possible(plain, texts, (), 1, 2) == {"a, b, c.", "d, e."}
    with pytest.raises(AssertionError, match="anew"):
        possible(data(tags={"shuffle": True}), texts, (), 1, 2)


def test_same_record_same_view_same_caption() -> None:
    settings = data(tags={"shuffle": True})
    first = [caption(settings, [TEXT], (), 1, n, v) for n in range(5) for v in range(5)]
    assert first == [caption(settings, [TEXT], (), 1, n, v) for n in range(5) for v in range(5)]
    assert first != [caption(settings, [TEXT], (), 2, n, v) for n in range(5) for v in range(5)]
