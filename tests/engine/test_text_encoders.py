"""Text encoders that learn, wholly or by adapters: exported, at every stage, with their own rate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from sfumato import methods, models
from sfumato.config import parse
from sfumato.engine import checkpoint
from sfumato.engine.weights import WeightFiles
from sfumato.errors import UserError
from sfumato.models.parts import Parts
from tests.engine import runs, toys
from tests.engine.ranks import run_ranks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_place(tmp_path_factory.mktemp("text"), "sd", "sdxl")


KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "text_encoders": True},
    "lora": {"kind": "lora", "rank": 4, "alpha": 2, "text_encoders": True},
}


def settings(place: Path, family: str, kind: str, name: str, **changes: Any) -> dict[str, Any]:
    values = runs.settings(place, family, name=name, **{"optimizer__lr": 1e-2, "steps": 2} | changes)
    return values | {"method": KINDS[kind]}


def train(jobs: list[dict[str, Any]], world: int = 1, bare: bool = True) -> list[Path]:
    train_them = runs.train_bare if bare else runs.train_all
    return run_ranks(train_them, world, jobs, timeout=280)[0]  # type: ignore[no-any-return]


def live(export: Path) -> tuple[Any, Parts]:
    """The method and its parts as they were when training ended."""
    folder = export.parent / "checkpoints"
    saved = checkpoint.Saved(checkpoint.path_of(folder, checkpoint.steps_in(folder)[-1]))
    config = parse(saved.state["config"])
    family = models.load(config.model, torch.device("cpu"), torch.float32, torch.float32)
    method = methods.build(config, family)
    parts = method.build().eval()
    start = WeightFiles(
        {**method.weights(), "": [*export.parent.glob("random.safetensors")]}, method.source_name
    )
    with torch.no_grad():
        for name, p in parts.named_parameters():
            whole = (
                saved.whole("weight", name)
                if name in saved.parameters
                else start(name, 0, p.numel()).view(p.shape)
            )
            p.copy_(whole)
    return method, parts


def drawn(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
    images = pipeline("a red fox", generator=torch.Generator().manual_seed(1), **options).images
    return images  # type: ignore[no-any-return]


def check_draws_as_the_live_model(pipeline: Any, method: Any, parts: Parts) -> None:
    theirs = method.pipeline(parts, {})[0]
    assert (drawn(pipeline) - drawn(theirs)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_stock_pipelines_draw_as_the_live_model(place: Path, family: str) -> None:
    """What was trained of the text encoders is in the export, and means the same there."""
    jobs = [settings(place, family, kind, f"{family}-{kind}", ema__enabled=False) for kind in KINDS]
    exports = train(jobs, bare=False)
    base = DiffusionPipeline.from_pretrained(place / family, safety_checker=None)
    method, parts = live(exports[0])
    pipeline = DiffusionPipeline.from_pretrained(exports[0], safety_checker=None)
    check_draws_as_the_live_model(pipeline, method, parts)
    pipeline.text_encoder = base.text_encoder  # the broken variant: an export with the base's encoder
    with pytest.raises(AssertionError):
        check_draws_as_the_live_model(pipeline, method, parts)
    method, parts = live(exports[1])
    for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        pipeline = DiffusionPipeline.from_pretrained(place / family, safety_checker=None)
        pipeline.load_lora_weights(exports[1], weight_name=file)
        check_draws_as_the_live_model(pipeline, method, parts)
        tensors = load_file(exports[1] / file)
        wanted = {"text_encoder.": "lora_te", "text_encoder_2.": "lora_te2"}
        for part in method.text:
            sign = f"{part}." if file.startswith("pytorch") else wanted[f"{part}."]
            assert any(name.startswith(sign) for name in tensors), f"{file} holds nothing of the {part}"


@pytest.mark.parametrize(("kind", "family"), [("full", "sdxl"), ("lora", "sd")])
def test_every_stage_learns_the_same_and_resumes(place: Path, kind: str, family: str) -> None:
    """Two steps at stage 0 on one rank, and on two: one at stage 1 and the next at 2; both at 3."""
    own = {"optimizer__text_encoder_lr": 1e-3, "steps": 2}
    [one] = train([settings(place, family, kind, f"{kind}-one", engine__zero_stage=0, **own)])
    jobs = [
        settings(place, family, kind, f"{kind}-{name}", engine__zero_stage=stage, **own | {"steps": steps})
        for name, stage, steps in (("moved", 1, 1), ("moved", 2, 2), ("third", 3, 2))
    ]
    _, moved, third = train(jobs, 2)
    for export in (moved, third):
        for weights in ("weight", "ema"):
            found = runs.tensors_of(export.parent, weights)
            assert toys.distance(found, runs.tensors_of(one.parent, weights)) < 2e-5


def moves(run: Path, place: Path) -> dict[str, float]:
    """How far each part went in one plain step of descent, relative to its learning rate."""
    method, _ = live(run / "export")
    files, found = WeightFiles(method.weights()), {}
    for name, after in runs.tensors_of(run).items():
        part = name.split(".")[0]
        gap = float((after.flatten() - files(name, 0, after.numel())).square().sum())
        found[part] = found.get(part, 0.0) + gap
    return {part: total**0.5 for part, total in found.items()}


def test_the_text_encoders_have_a_rate_of_their_own(place: Path) -> None:
    plain = {"optimizer__name": "sgd", "optimizer__weight_decay": 0.0, "optimizer__max_grad_norm": 0.0}
    plain |= {"optimizer__lr": 1e-3, "steps": 1}
    jobs = [
        settings(place, "sd", "full", f"rate-{stage}-{lr}", engine__zero_stage=stage,
                 optimizer__text_encoder_lr=lr, **plain)
        for stage, lr in ((1, 1e-3), (1, 1e-2), (3, 1e-2))
    ]  # fmt: skip
    same, *others = (moves(export.parent, place) for export in train(jobs))
    for tenfold in others:
        assert tenfold["unet"] == pytest.approx(same["unet"], rel=1e-4)
        assert tenfold["text_encoder"] == pytest.approx(10 * same["text_encoder"], rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__cache": "captions"}, "before they learned"),
        ({"method": {"kind": "full"}, "optimizer__text_encoder_lr": 1e-3}, "no text encoder learns"),
    ],
)
def test_settings_that_cannot_be(place: Path, changes: dict[str, Any], words: str) -> None:
    method = changes.pop("method", KINDS["full"])
    with pytest.raises(UserError, match=words):
        parse(runs.settings(place, "sd", **changes) | {"method": method})
