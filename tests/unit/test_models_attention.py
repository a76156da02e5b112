"""Attention backends and gradient checkpointing of the denoiser."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato import models
from sfumato.config import Checkpointing
from sfumato.errors import UserError
from sfumato.models.attention import probe
from sfumato.models.denoiser import prepare
from tests.unit.twins import batch_of, family

ALL = pytest.mark.parametrize("name", models.families())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each of diffusers' backends is called; they still do their work."""
    calls: dict[str, int] = {}

    def counting(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Any, **options: Any) -> Tensor:
            calls[name] = calls.get(name, 0) + 1
            return function(*inputs, **options)

        return call

    for backend, function in dict(Registry._backends).items():
        monkeypatch.setitem(Registry._backends, backend, counting(backend.value, function))
    yield calls


def answer(
    name: str, attention: str | None, checkpointing: bool
) -> tuple[Tensor, dict[str, Tensor], nn.Module]:
    """Prediction and gradients of a twin's denoiser."""
    part = family(name)
    torch.manual_seed(0)
    net = part.build_denoiser()
    prepare(net, attention, checkpointing)
    net.train()
    batch = batch_of(["a cat", "a dog"])
    latents, condition = part.encode(batch)
    prediction = part.predict(net, latents, torch.tensor([3.0, 700.0]), condition)
    prediction.square().mean().backward()
    return prediction, {key: p.grad for key, p in net.named_parameters() if p.grad is not None}, net


@ALL
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_a_backend_is_used_and_gives_the_same(name: str, backend: str, counted: dict[str, int]) -> None:
    right, right_grads, plain = answer(name, None, False)
    assert counted == {}
    found, grads, net = answer(name, backend, False)
    layers = sum(type(part).__name__ == "Attention" for part in net.modules())
    assert counted == {backend: layers}, "diffusers' own switch would leave the U-Net as it is"
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert grads.keys() == right_grads.keys() == dict(plain.named_parameters()).keys()
    for key in grads:
        torch.testing.assert_close(grads[key], right_grads[key], rtol=1e-3, atol=1e-6)


def test_an_unknown_backend_lists_the_ones_that_work_here() -> None:
    net = family("sd").build_denoiser()
    with pytest.raises(UserError, match="knows no such") as error:
        prepare(net, "flsh", False)
    assert "native" in error.value.do and "_native_npu" not in error.value.do
    with pytest.raises(UserError, match="torch_npu"):
        prepare(net, "_native_npu", False)


def test_the_probe_passes_native_and_refuses_what_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for width in (8, 40, 64):
        probe("_native_math", cpu, torch.float32, width)
        probe("native", cpu, torch.bfloat16, width)
    with pytest.raises(UserError, match="does not run on cpu"):
        probe("_native_cudnn", cpu, torch.float32, 64)
    backend = next(key for key in Registry._backends if key.value == "_native_math")
    right = Registry._backends[backend]

    def no_compiler(*_: Any, **__: Any) -> Tensor:
        raise FileNotFoundError("no ninja here")

    monkeypatch.setitem(Registry._backends, backend, no_compiler)
    with pytest.raises(UserError, match="no ninja here"):
        probe("_native_math", cpu, torch.float32, 64)

    def forward_only(*inputs: Any, **options: Any) -> Tensor:
        """As inference-only kernels do: a right answer that ends the graph for queries and keys."""
        options = {
            key: value.detach() if key in ("query", "key") else value for key, value in options.items()
        }
        return right(*inputs, **options)

    monkeypatch.setitem(Registry._backends, backend, forward_only)
    with pytest.raises(UserError, match="gradient"):
        probe("_native_math", cpu, torch.float32, 64)


# Gradient checkpointing.


@ALL
def test_checkpointing_computes_again_and_gives_the_same(name: str) -> None:
    forwards: dict[Checkpointing, int] = {True: 0, False: 0, "selective": 0}

    def gradients(checkpointing: Checkpointing) -> dict[str, Tensor]:
        part = family(name)
        torch.manual_seed(0)
        net = part.build_denoiser().train()
        prepare(net, None, checkpointing)
        for block in net.modules():
            if type(block).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
                block.register_forward_pre_hook(
                    lambda *_: forwards.update({checkpointing: forwards[checkpointing] + 1})
                )
        latents, condition = part.encode(batch_of(["a cat"]))
        part.predict(net, latents, torch.tensor([500.0]), condition).square().mean().backward()
        return {key: p.grad for key, p in net.named_parameters() if p.grad is not None}

    plain = gradients(False)
    kinds: tuple[Checkpointing, ...] = (True, "selective")
    for checkpointing in kinds:
        again = gradients(checkpointing)
        assert forwards[checkpointing] > 1.5 * forwards[False], forwards
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[key], again[key]) for key in plain)


def check_not_reentrant(net: nn.Module) -> None:
    """Checkpointing gives gradients also where the input has none; the re-entrant kind does not."""
    blocks = [part for part in net.modules() if getattr(part, "gradient_checkpointing", False)]
    assert blocks, "nothing is checkpointed"
    for block in blocks:
        layer = nn.Linear(2, 2)
        out = block._gradient_checkpointing_func(layer, torch.ones(1, 2))
        assert out.requires_grad, f"{type(block).__name__} loses gradients"
        out.sum().backward()
        assert layer.weight.grad is not None


@ALL
def test_checkpointing_is_not_reentrant(name: str) -> None:
    net = family(name).build_denoiser()
    prepare(net, None, True)
    check_not_reentrant(net)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_the_check_catches_reentrant_checkpointing_and_none() -> None:
    net = family("sd").build_denoiser()
    with pytest.raises(AssertionError, match="nothing is checkpointed"):
        check_not_reentrant(net)
    net.enable_gradient_checkpointing(lambda module, *inputs: checkpoint(module, *inputs, use_reentrant=True))
    with pytest.raises(AssertionError, match="loses gradients"):
        check_not_reentrant(net)
