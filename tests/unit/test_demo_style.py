"""The style distance sees how things are drawn and not what; the shipped base is what is claimed."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sfumato import config
from sfumato.demo import emoji, measure, run
from sfumato.demo.run import SETTINGS, SHIPPED, demo, real


@pytest.fixture(scope="module")
def sets() -> dict[str, Tensor]:
    codes = list(emoji.concepts())[:80]
    return {style: real(style, codes) for style in ("noto", "openmoji")}


def test_style_is_how_and_not_what(sets: dict[str, Tensor]) -> None:
    """Other concepts of the style are near, mirrored ones too; another style and blurred ones are far."""
    pool = measure.style(sets["openmoji"][40:])

    def away(images: Tensor) -> float:
        return measure.style_distance(measure.style(images), pool)

    others = sets["openmoji"][:40]
    blurred = functional.interpolate(functional.avg_pool2d(others, 4), scale_factor=4.0)
    noto = away(sets["noto"][:40])
    assert abs(away(others)) < 0.1 * noto and abs(away(others.flip(3))) < 0.1 * noto
    assert away(blurred) > 0.1 * noto  # measured: 12, against 48 for Noto and 0.2 for others of the style


def test_style_distance_is_in_units_of_the_pool() -> None:
    draw = torch.Generator().manual_seed(0)
    pool, points = torch.randn(30, 6, generator=draw), torch.randn(12, 6, generator=draw) + 0.5
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0, 7.0, 0.5])
    scaled = measure.style_distance(points * scale + 2, pool * scale + 2)
    assert scaled == pytest.approx(measure.style_distance(points, pool), rel=1e-3)
    assert measure.kernel_distance(points * scale, pool * scale) != pytest.approx(scaled, rel=0.1)


def test_the_shipped_weights_fit_in_20_mb() -> None:
    files = list(SHIPPED.rglob("*.safetensors"))
    assert len(files) == 3 and sum(file.stat().st_size for file in files) <= 20e6


@pytest.mark.parametrize("ranks", [1, 2, run.MOST_RANKS])
def test_the_batch_is_cut_among_all_ranks(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: range(ranks + ranks % 2))
    monkeypatch.setattr(run, "has_accelerator", lambda _: ranks == 1)
    settings = config.load(SETTINGS, run.suited())
    assert run.ranks() == ranks and settings.micro_batch_size * ranks == settings.batch_size


def test_a_cpu_without_bf16_trains_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for accelerator, bf16 in product((True, False), (True, False)):
        monkeypatch.setattr(run, "has_accelerator", lambda _, found=accelerator: found)
        monkeypatch.setattr(run, "has_bf16", lambda found=bf16: found)
        precision = config.load(SETTINGS, run.suited()).engine.precision
        assert precision == ("bf16" if accelerator or bf16 else "fp32")


def test_the_demo_runs_and_its_base_draws_what_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of training and few of drawing: what tuning does is shown by the demo itself, not here."""
    drawn = run.drawn

    def quickly(model: Path, prompts: list[str]) -> Any:
        sampling = replace(run.SAMPLING, steps=4 if model == SHIPPED else 1)
        monkeypatch.setattr(run, "SAMPLING", sampling)
        return drawn(model, prompts)

    monkeypatch.setattr(run, "drawn", quickly)
    monkeypatch.setattr(run, "ranks", lambda: 1)
    small = ("steps=2", "optimizer.warmup_steps=0", "batch_size=8", "micro_batch_size=8")
    result = demo(tmp_path, overrides=small)
    assert result.picture.is_file()
    assert result.own >= 16, f"{result.own} of {emoji.PROMPTS} base drawings are nearest to their own image"
    assert result.before > 1
