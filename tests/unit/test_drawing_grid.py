"""Drawings as one labelled sheet: every picture in its place, every label readable."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from sfumato.drawing.grid import grid

START = "a red fox beside a house " * 13
COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta"]


def check_grid(grid: Callable[..., Image.Image]) -> None:
    """Pictures stand row by row, none over another, and labels are drawn."""
    images = [Image.new("RGB", (64, 64), colour) for colour in COLOURS]
    sheet = grid(images, ["first", "second"], ["one", "two", "three"])
    boxes = []
    for image in images:
        colour = np.array(image.getpixel((0, 0)))
        y, x = np.nonzero((np.asarray(sheet) == colour).all(-1))
        boxes.append((x.min(), y.min(), x.max(), y.max()))
        assert len(x) == (x.max() - x.min() + 1) * (y.max() - y.min() + 1), "a picture is covered"
    assert boxes == sorted(boxes, key=lambda box: (box[1], box[0])), "pictures out of order"
    assert len({box[0] for box in boxes}) == 3 and len({box[1] for box in boxes}) == 2
    grey = np.asarray(sheet.convert("L"))
    assert (grey[:, : boxes[0][0] - 2] < 100).any(), "no labels at the rows"
    assert (grey[: boxes[0][1] - 2, boxes[0][0] :] < 100).any(), "no labels at the columns"
    assert (grey[[0, -1]] == 255).all() and (grey[:, [0, -1]] == 255).all(), "ink at the edge"


def test_grid() -> None:
    check_grid(grid)


def test_grid_catches_columns_taken_for_rows() -> None:
    with pytest.raises(AssertionError, match="order"):
        check_grid(lambda images, rows, columns: grid([images[i] for i in (0, 3, 1, 4, 2, 5)], rows, columns))


def test_grid_catches_missing_labels() -> None:
    with pytest.raises(AssertionError, match="labels"):
        check_grid(lambda images, rows, columns: grid(images, [""] * 2, [""] * 3))


@pytest.mark.parametrize("label", [START * 2, "x" * 500, "", "猫 " * 40, "word"])
@pytest.mark.parametrize("size", [(64, 64), (300, 200), (20, 90)])
def test_labels_never_touch_pictures_or_edges(label: str, size: tuple[int, int]) -> None:
    sheet = grid([Image.new("RGB", size, "white")] * 4, [label, "b"], [label, "d"], title=label)
    grey = np.asarray(sheet.convert("L"))
    assert (grey[[0, -1]] > 250).all() and (grey[:, [0, -1]] > 250).all(), "ink at the edge"
    assert sheet.width < 4 * max(size[0], 160) + 100


def test_a_grid_of_the_wrong_number_of_pictures() -> None:
    with pytest.raises(AssertionError, match="fill"):
        grid([Image.new("RGB", (8, 8))] * 3, ["a", "b"], ["c", "d"])


@pytest.mark.parametrize("label", ["word " * 20_000, "x" * 20_000])
def test_a_label_as_long_as_a_book_takes_no_longer_than_what_is_shown_of_it(label: str) -> None:
    began = time.process_time()
    sheet = grid([Image.new("RGB", (64, 64), "white")] * 4, [label, "b"], ["c", "d"])
    assert time.process_time() - began < 2 and sheet.height < 1000
