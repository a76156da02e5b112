"""A sample's random numbers: named by (seed, sample, visit, stream), independent, and the same for ever."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from sfumato.data import draws

Normal = Callable[[int, int, int, int, tuple[int, ...]], np.ndarray]
NAMES = list(product((0, 1, 2**62), (0, 1, 7), (0, 1, 2), (draws.NOISE, draws.POSTERIOR)))


def check_independent(normal: Normal) -> None:
    """T4: other names give other and uncorrelated numbers, equal names equal ones."""
    first = [normal(*name, (4, 16, 16)) for name in NAMES]
    again = [normal(*name, (4, 16, 16)) for name in reversed(NAMES)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True)), "not a function of its name"
    assert len({values.tobytes() for values in first}) == len(NAMES), "two names share their numbers"
    flat = np.stack([values.ravel() for values in first])
    apart = np.corrcoef(flat) - np.eye(len(flat))
    # 1431 pairs of 1024 numbers: 5 standard deviations of a correlation.
    assert np.abs(apart).max() < 5 / np.sqrt(flat.shape[1]), "numbers of two names are correlated"


def test_independent() -> None:
    check_independent(draws.normal)


@pytest.mark.parametrize("forgotten", range(4))
def test_independent_catches_a_forgotten_key(forgotten: int) -> None:
    def broken(seed: int, sample: int, visit: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
        name = [seed, sample, visit, stream]
        name[forgotten] = 0
        return draws.normal(name[0], name[1], name[2], name[3], shape)

    with pytest.raises(AssertionError, match="share"):
        check_independent(broken)


def test_independent_catches_a_running_generator() -> None:
    running = np.random.default_rng(0)
    with pytest.raises(AssertionError, match="not a function"):
        check_independent(lambda *name: running.standard_normal(name[-1], np.float32))


def test_independent_catches_neighbouring_counters() -> None:
    """A name in the counter's lowest word: the next sample continues one block later."""

    def broken(seed: int, sample: int, visit: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
        bits = np.random.Philox(key=np.array([seed, stream]), counter=np.array([sample, visit, 0, 0]))
        uniform = np.random.Generator(bits).random(shape)
        shifted = uniform.ravel()
        return shifted

    flat = [broken(0, sample, 0, 1, (64,)) for sample in (0, 1)]
    assert np.array_equal(flat[0][4:], flat[1][:-4]), "the trap that the upper words avoid"


def test_streams_are_apart() -> None:
    names = "CROP FLIP CAPTION DROPOUT POSTERIOR NOISE TIMESTEP OFFSET PERTURBATION ORDER".split()
    numbers = [getattr(draws, name) for name in names]
    assert len(set(numbers)) == len(numbers)


def test_numbers_are_those_of_the_first_release() -> None:
    """A run that is resumed with a newer numpy or Sfumato must draw what it drew before."""
    noise = draws.normal(7, 11, 13, draws.NOISE, (4, 8, 8))
    assert noise.dtype == np.float32
    corners = [2.2929346561431885, -0.6496097445487976, -0.3101867735385895, 0.6576175093650818]
    assert np.allclose(noise.ravel()[[0, 1, 254, 255]], corners, rtol=1e-6, atol=0)
    assert draws.uniform(7, 11, 13, draws.DROPOUT) == 0.3896702495331118
    assert draws.bits(7, 0, 13, draws.ORDER).random_raw(2).tolist() == [
        15064882813221739489,
        3981953195768817257,
    ]


def check_normal(values: np.ndarray) -> None:
    """Mean, variance, skewness and kurtosis of N(0, 1) within 5 standard errors."""
    n, v = values.size, values.astype(np.float64).ravel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = abs((v**power).mean() - moment)
        assert error < 5 * np.sqrt(spread / n), f"moment {power} is off by {error}"


def test_noise_is_normal() -> None:
    check_normal(np.stack([draws.normal(0, n, 0, draws.NOISE, (4, 32, 32)) for n in range(32)]))
    # Across samples, at one place: what a batch sees.
    check_normal(np.stack([draws.normal(0, n, 0, draws.NOISE, (1,)) for n in range(4000)]))


def test_noise_is_normal_catches_uniform_numbers() -> None:
    uniform = np.stack([draws.generator(0, n, 0, draws.NOISE).random(4096) for n in range(8)])
    with pytest.raises(AssertionError, match="moment"):
        check_normal((uniform - 0.5) * np.sqrt(12))


def check_uniform(u: np.ndarray, cells: int = 50) -> None:
    """Chi-square of numbers in [0, 1) against the uniform law, one-sided at 5 standard deviations."""
    assert u.min() >= 0 and u.max() < 1, "outside [0, 1)"
    seen, expected = np.bincount((u * cells).astype(int), minlength=cells), len(u) / cells
    chi = ((seen - expected) ** 2 / expected).sum()
    assert chi < cells - 1 + 5 * np.sqrt(2 * (cells - 1)), f"chi-square {chi:.0f} of {cells} cells"
    assert chi > cells - 1 - 4 * np.sqrt(2 * (cells - 1)), f"chi-square {chi:.0f}: too even to be random"


@pytest.mark.parametrize("stream", [draws.TIMESTEP, draws.CROP, draws.DROPOUT])
def test_uniform_over_samples_and_over_visits(stream: int) -> None:
    check_uniform(np.array([draws.uniform(5, n, 0, stream) for n in range(5000)]))
    check_uniform(np.array([draws.uniform(5, 0, n, stream) for n in range(5000)]))


def test_uniform_catches_a_bias_and_a_grid() -> None:
    u = np.array([draws.uniform(5, n, 0, draws.TIMESTEP) for n in range(5000)])
    with pytest.raises(AssertionError, match="chi-square"):
        check_uniform(u**1.2)
    with pytest.raises(AssertionError, match="too even"):
        check_uniform((np.arange(5000) + 0.5) / 5000)


def test_pick_is_even_and_inside() -> None:
    assert [draws.pick(u, 4) for u in (0.0, 0.2499, 0.25, 0.9999, np.nextafter(1, 0))] == [0, 0, 1, 3, 3]
    assert draws.pick(0.99, 1) == 0
