"""A text's keys and values are computed once for all denoising steps, and no bit of a picture changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.drawing import draw as drawing
from sfumato.drawing import model, pipelines, textkeys
from sfumato.drawing.adapters import add_loras, load_control
from sfumato.drawing.request import Sampling, Shot
from sfumato.models import compiled
from tests.unit import twins
from tests.unit.toy_drawing import write_control, write_lora, write_picture

STEPS = 3
HOW = Sampling(steps=STEPS, guidance=3.0, size=32)


@contextmanager
def not_at_all(parts: Any) -> Iterator[None]:
    yield


class Products(TorchDispatchMode):
    """Within it the products of layers are counted."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::mm", "aten::addmm")
        return func(*args, **kwargs or {})


def of_texts(parts: list[nn.Module]) -> int:
    """The products with a text at one denoising step."""
    blocks = [block for part in parts for block in part.modules() if isinstance(block, Attention)]
    layers = [layer for b in blocks if b.is_cross_attention for layer in (b.to_k, b.to_v)]
    return sum(isinstance(inner, nn.Linear) for layer in layers for inner in layer.modules())


def pictures(pipeline: Any, shots: list[Shot], control: Any = None) -> tuple[list[bytes], int]:
    """Pictures, and the products that they took."""
    with Products() as products:
        found = drawing.draw(pipeline, shots, HOW, control=control)
    return [each.image.tobytes() for each in found], products.count


def check_same(
    pipeline: Any, shots: list[Shot], monkeypatch: pytest.MonkeyPatch, control: Any = None
) -> None:
    """Fail unless pictures are the same, for one denoising step's products with texts."""
    found, once = pictures(pipeline, shots, control)
    with monkeypatch.context() as patched:
        patched.setattr(drawing, "remembering", not_at_all)
        right, always = pictures(pipeline, shots, control)
    assert found == right, "other pictures"
    assert len(set(right)) == len(right), "the pictures are alike, so that nothing was tried"
    wanted = of_texts([pipeline.unet, *([control] if control is not None else [])])
    assert wanted and always - once == (STEPS - 1) * len(shots) * wanted


SHOTS = [Shot("a red fox", 1), Shot("a small boat on the sea", 1)]


@pytest.fixture
def pipeline() -> Any:
    return pipelines.open_pipeline(twins.twin("sd"), "cpu", torch.float32, 77, None)[0]


def test_texts_are_read_once(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_same(pipeline, SHOTS, monkeypatch)
    assert not any("forward" in vars(module) for module in pipeline.unet.modules()), "something stayed behind"


def test_with_a_lora_and_a_controlnet(pipeline: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    base = twins.twin("sd")
    add_loras(pipeline, [(write_lora(tmp_path / "lora.safetensors", base), 1.0)])
    control = load_control(write_control(tmp_path / "control", base), torch.float32, "cpu")
    condition = write_picture(tmp_path / "condition.png")
    shots = [Shot(shot.prompt, shot.seed, condition=condition) for shot in SHOTS]
    check_same(pipeline, shots, monkeypatch, control)


def deaf(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Remembers the first text for ever."""
    kept: list[Tensor] = []

    def answer(text: Tensor) -> Tensor:
        kept.extend([] if kept else [forward(text)])
        return kept[0]

    return answer


def test_catches_a_memory_of_another_text(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(textkeys, "remembered", deaf)
        with pytest.raises(AssertionError, match="other pictures"):
            check_same(pipeline, SHOTS, monkeypatch)


def test_a_text_that_was_written_to_is_read_again() -> None:
    layer = nn.Linear(4, 4)
    ask, text = textkeys.remembered(layer.forward), torch.ones(1, 4)
    with torch.no_grad():
        first = ask(text)
        assert ask(text) is first
        text.add_(1)
        assert torch.equal(ask(text), layer(text)) and not torch.equal(ask(text), first)
    assert ask(text).requires_grad, "a gradient would be lost"


def test_the_vae_and_the_compiler_are_as_asked(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right, _ = pictures(pipeline, SHOTS[:1])
    for vae in ("sliced", "tiled"):
        ready = model.find(twins.twin("sd"), vae=vae)
        model.settle(ready, pipeline, None)
        assert getattr(pipeline.vae, f"use_{vae.removesuffix('ed')}ing")
        assert ready.settings()["vae"] == vae
    pipeline.vae.disable_tiling()
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(compiled, "KINDS", ())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(cache_size_limit=8, fail_on_cache_limit_hit=False):
        ready = model.find(twins.twin("sd"), compile=True)
        model.settle(ready, pipeline, None)
        [found] = drawing.draw(pipeline, SHOTS[:1], HOW)
    torch._dynamo.reset()
    assert [found.image.tobytes()] == right and ready.settings()["compile"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
