"""An adapter in one operator gives what peft's three give, and its gradients."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from sfumato.methods.joined import join

NAME = "default"


def net(**settings: Any) -> Any:
    """Two layers with adapters whose second matrix is not zero, and one of an image."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(5, 4, bias=False), "c": nn.Conv2d(3, 3, 1)})
    rule = peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=["a", "b", "c"], **settings)
    made = peft.inject_adapter_in_model(rule, layers, NAME)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3)
    return made


def answer(layers: Any) -> list[Tensor]:
    """What two layers say of rows of two dimensions, and the gradients of all that learns."""
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    said = layers["b"](layers["a"](x))
    said.square().sum().backward()
    learned = [p for name, p in layers.named_parameters() if "lora" in name and not name.startswith("c")]
    return [said, x.grad, *(p.grad for p in learned)]  # type: ignore[list-item]


def check(layers: Any, other: Any) -> None:
    for one, two in zip(answer(layers), answer(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_the_same_answers_and_gradients() -> None:
    plain = net()
    ours = copy.deepcopy(plain)
    assert join(ours, NAME) == 2
    check(ours, plain)
    assert [*ours.state_dict()] == [*plain.state_dict()]


@pytest.mark.parametrize("wrong", ["scale", "sum"])
def test_catches(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = net()
    ours, right = copy.deepcopy(plain), torch.addmm
    join(ours, NAME)

    def spoilt(base: Tensor, low: Tensor, second: Tensor, alpha: float) -> Tensor:
        return right(base, low, second) if wrong == "scale" else right(base * 0, low, second, alpha=alpha)

    monkeypatch.setattr(torch, "addmm", spoilt)
    with pytest.raises(AssertionError):
        check(ours, plain)


def test_other_adapters_stay_as_they_are() -> None:
    assert join(net(use_dora=True), NAME) == 0
    assert join(net(lora_bias=True), NAME) == 0


def test_switched_off_and_merged_it_does_as_peft_does() -> None:
    plain = net()
    ours = copy.deepcopy(plain)
    join(ours, NAME)
    x = torch.randn(2, 6)
    for layers in (plain, ours):
        layers["a"].enable_adapters(False)
    assert torch.equal(ours["a"](x), plain["a"](x))
    for layers in (plain, ours):
        layers["a"].enable_adapters(True)
    asked = ours["a"](x)
    ours["a"].merge()
    torch.testing.assert_close(ours["a"](x), asked, rtol=1e-5, atol=1e-6)
