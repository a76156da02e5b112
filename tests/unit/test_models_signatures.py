"""Attention's processors have their signatures: a forward pass looks nothing up, and nothing changes."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from sfumato.models.signatures import remember
from tests.unit.twins import family


@pytest.fixture
def net() -> Iterator[nn.Module]:
    """A denoiser with its processors as diffusers made them; afterwards they are as they were found."""
    made = family("sd").build_denoiser()
    call: Any = AttnProcessor2_0.__call__
    before = vars(call).pop("__signature__", None)
    yield made
    vars(call).pop("__signature__", None)
    if before is not None:
        call.__signature__ = before


@contextmanager
def looked_up() -> Iterator[list[Any]]:
    """Within it each signature that Python puts together is listed."""
    found: list[Any] = []
    own = inspect._signature_from_function  # type: ignore[attr-defined]

    def told(cls: Any, func: Any, **more: Any) -> Any:
        found.append(func)
        return own(cls, func, **more)

    inspect._signature_from_function = told  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        inspect._signature_from_function = own  # type: ignore[attr-defined]


def answer(net: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 77, 32, generator=draw)
    with torch.no_grad():
        found: Tensor = net(x, torch.tensor([1, 500]), text, return_dict=False)[0]
    return found


def test_a_forward_pass_looks_nothing_up_and_gives_the_same(net: nn.Module) -> None:
    layers = sum(isinstance(module, Attention) for module in net.modules())
    with looked_up() as before:
        plain = answer(net)
    remember(net)
    with looked_up() as after:
        assert torch.equal(answer(net), plain)
    assert len(before) >= layers > 0 and not after


def test_it_is_the_signature_that_python_finds(net: nn.Module) -> None:
    found = inspect.signature(AttnProcessor2_0().__call__)
    remember(net)
    assert inspect.signature(AttnProcessor2_0().__call__) == found
    # Broken: one that lacks a parameter is seen by the same look.
    call: Any = AttnProcessor2_0.__call__
    whole = call.__signature__
    call.__signature__ = whole.replace(parameters=[*whole.parameters.values()][:-3])
    assert inspect.signature(AttnProcessor2_0().__call__) != found
