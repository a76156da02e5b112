"""Near duplicates: the hash sees what people see, and the search finds every pair and no other."""

import io
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from sfumato.audit import duplicates
from sfumato.audit.duplicates import BITS, LEVELS, PLAIN, exact, near
from sfumato.audit.pixels import difference_hash, pixels
from tests.unit.test_audit import scene

Hash = Callable[[np.ndarray], int]


def saved(image: Image.Image, kind: str, **options: int) -> Image.Image:
    """The picture after it was saved and read again."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file).convert("RGB")


def bits(one: Image.Image, other: Image.Image) -> int:
    """How many bits of two pictures' hashes differ."""
    return (pixels(one).hash ^ pixels(other).hash).bit_count()


@pytest.mark.parametrize("number", range(8))
def test_what_looks_alike_is_near(number: int) -> None:
    image = scene(number, (256, 384))
    for again in (
        saved(image, "JPEG", quality=40),
        saved(image, "WEBP", quality=40),
        image.resize((150, 100)),
        saved(image.resize((96, 64)), "JPEG", quality=75),
        ImageEnhance.Brightness(image).enhance(1.03),
    ):
        assert bits(image, again) <= BITS
    for other in (
        ImageOps.mirror(image),
        ImageOps.flip(image),
        image.rotate(180),
        image.crop((0, 0, 256, 170)),
        scene(number + 100, (256, 384)),
    ):
        assert bits(image, other) > 8


def test_an_even_ground_has_no_noise() -> None:
    """A drawing on white keeps its hash when it is saved again: the ground's levels are not compared."""
    drawing = Image.new("RGB", (128, 128), "white")
    drawing.paste((200, 30, 30), (40, 40, 90, 100))
    assert bits(drawing, saved(drawing, "JPEG", quality=50)) == 0


def without_rows(grey: np.ndarray) -> int:
    """A hash that looks at the columns only."""
    return difference_hash(np.broadcast_to(grey.mean(0), grey.shape))


def without_columns(grey: np.ndarray) -> int:
    """A hash of each row's mean."""
    return difference_hash(np.broadcast_to(grey.mean(1, keepdims=True), grey.shape))


def check_rows_and_columns(hash_of: Hash) -> None:
    """Fail unless pictures that differ only in the order of their rows, or columns, are told apart."""
    grey = np.random.default_rng(0).integers(0, 256, (8, 9)).astype(np.float64)
    for other in (grey[::-1], grey[:, ::-1]):
        assert (hash_of(grey) ^ hash_of(other)).bit_count() > 8
    assert hash_of(grey) == hash_of(grey)


def test_the_hash_sees_rows_and_columns() -> None:
    check_rows_and_columns(difference_hash)


@pytest.mark.parametrize("broken", [without_rows, without_columns, lambda grey: 0])
def test_a_hash_that_does_not_is_caught(broken: Hash) -> None:
    with pytest.raises(AssertionError):
        check_rows_and_columns(broken)


def test_another_colour_is_another_picture() -> None:
    """A red heart and a blue one have the same shape and brightness; both are wanted."""
    grey = scene(3).convert("L")
    red, blue = ImageOps.colorize(grey, "black", "#ff0000"), ImageOps.colorize(grey, "black", "#0000ff")
    told = [pixels(image) for image in (red, blue)]
    hashes = np.array([each.hash for each in told], np.uint64)
    colours = np.array([list(each.colours) for each in told], np.uint8)
    assert len(near(np.full(2, hashes[0]), colours, np.ones(2, bool))) == 0
    assert len(near(np.full(2, hashes[0]), colours[[0, 0]], np.ones(2, bool))) == 1


def made(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes with chains of near ones among them, colours, and which count."""
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2**64, count, np.uint64)
    colours = random.integers(40, 200, (count, 12), np.uint8)
    for number in range(count // 2):
        source = int(random.integers(0, count))
        flips = random.choice(64, int(random.integers(0, 6)), replace=False)
        target = int(random.integers(0, count))
        mask = np.uint64(sum(1 << bit for bit in flips.tolist()))
        hashes[target] = hashes[source] ^ mask
        shift = random.integers(-LEVELS - 2, LEVELS + 3, 12) * (number % 3 > 0)
        colours[target] = np.clip(colours[source].astype(int) + shift // (1 + number % 2), 0, 255)
    return hashes, colours, random.random(count) < 0.9


def plainly(hashes: np.ndarray, colours: np.ndarray, usable: np.ndarray) -> set[tuple[int, ...]]:
    """The groups, found by comparing each with each."""
    group = list(range(len(hashes)))
    held = [PLAIN <= int(told).bit_count() <= 64 - PLAIN for told in hashes]

    def root(number: int) -> int:
        while group[number] != number:
            number = group[number]
        return number

    for one in np.flatnonzero(usable).tolist():
        for other in range(one):
            gap = int(np.abs(colours[one].astype(int) - colours[other]).max())
            close = (int(hashes[one]) ^ int(hashes[other])).bit_count() <= BITS and gap <= LEVELS
            if usable[other] and close and held[one] and held[other]:
                group[max(root(one), root(other))] = min(root(one), root(other))
    found: dict[int, list[int]] = {}
    for number in range(len(hashes)):
        found.setdefault(root(number), []).append(number)
    return {tuple(members) for members in found.values() if len(members) > 1}


def check_search(seed: int) -> None:
    """Fail unless the search finds the groups that comparing each with each finds."""
    told = made(300, seed)
    found = near(*told)
    assert {tuple(group.tolist()) for group in found} == plainly(*told)
    firsts = [int(group[0]) for group in found]
    assert firsts == sorted(firsts) and len(found) > 10
    assert found.extra == sum(len(group) - 1 for group in found)


@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_what_comparing_all_finds(seed: int) -> None:
    check_search(seed)


def test_a_search_that_forgets_a_band_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = duplicates.bits_of
    monkeypatch.setattr(duplicates, "bits_of", lambda hashes, band: real(hashes, band % 4))
    with pytest.raises(AssertionError):
        for seed in range(6):
            check_search(seed)


@pytest.mark.parametrize("flips", [(0, 20, 40), (15, 16, 63), (1, 2, 3), (13, 29, 45), (16, 28, 40)])
def test_three_bits_anywhere_are_found(flips: tuple[int, ...]) -> None:
    one = 0x0F0F_3C3C_5555_A0A5
    other = one ^ sum(1 << bit for bit in flips)
    shades = np.full((2, 12), 90, np.uint8)
    assert len(near(np.array([one, other], np.uint64), shades, np.ones(2, bool))) == 1


def test_exact_ones_are_those_of_equal_bytes() -> None:
    random = np.random.default_rng(1)
    digests = random.integers(0, 256, (50, 16), np.uint8)
    digests[[7, 30, 41]] = digests[3]
    digests[20] = digests[10]
    digests[21, :8] = digests[10, :8]  # the same first half alone is another file
    usable = np.ones(50, bool)
    usable[30] = False
    assert [group.tolist() for group in exact(digests, usable)] == [[3, 7, 41], [10, 20]]
    assert len(exact(digests[:0], usable[:0])) == 0


def test_thousands_of_copies_take_no_longer() -> None:
    hashes = np.full(50_000, 0x0F0F_3C3C_5555_A0A5, np.uint64)
    hashes[1::2] = 0  # as of an even ground
    found = near(hashes, np.full((50_000, 12), 90, np.uint8), np.ones(50_000, bool))
    assert [len(group) for group in found] == [25_000, 25_000]


def test_memory_is_below_64_bytes_a_record() -> None:
    count = 400_000
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, count, np.uint64)
    colours = random.integers(0, 256, (count, 12), np.uint8)
    given = hashes.nbytes + colours.nbytes + 2 * count  # with the traits
    tracemalloc.start()
    try:
        near(hashes, colours, np.ones(count, bool))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert given + most < 64 * count + 16 * 2**20
