"""Divisions by one are left out: the same numbers to the bit, from fewer operators."""

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato import models
from sfumato.bench.gates.count import computes
from sfumato.models import unscaled
from sfumato.models.denoiser import prepare
from sfumato.models.unscaled import FACTORS, ONE, scale, unscale
from tests.unit.twins import batch_of, family

FAMILIES = models.families()


class Counted(TorchDispatchMode):
    """Within it operators are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name] += computes(func)
        return func(*args, **kwargs or {})


def step_of(net: nn.Module, *inputs: Tensor) -> tuple[list[Tensor], Counter[str]]:
    """A net's answers and gradients, and the operators that made them."""
    net.requires_grad_(True).zero_grad()
    with Counted() as counted:
        found = net(*inputs, return_dict=False)
        answers = [each for part in found for each in (part if isinstance(part, tuple | list) else [part])]
        torch.stack([answer.square().mean() for answer in answers]).sum().backward()
    return [*answers, *(p.grad for p in net.parameters() if p.grad is not None)], counted.found


def divided(net: nn.Module) -> int:
    """How many modules divide."""
    return sum(factor in vars(module) for module in net.modules() for factor in FACTORS)


def check_same(net: nn.Module, *inputs: Tensor) -> None:
    """Fail unless the divisions, and nothing else, are gone; the net is changed."""
    with_them, before = step_of(net, *inputs)
    unscale(net)
    without, after = step_of(net, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(with_them, without, strict=True))
    assert before - after == {"aten::div": 2 * divided(net)} and not after - before
    scale(net)
    assert step_of(net, *inputs)[1] == before
    unscale(net)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_denoiser_and_its_controlnet_are_the_same_to_the_bit(name: str) -> None:
    part = family(name)
    torch.manual_seed(0)
    for net in (part.build_denoiser(), ControlNetModel.from_unet(part.build_denoiser())):
        latents, condition = part.encode(batch_of(["a cat"]))
        told = part.inputs(torch.float32, latents, torch.tensor([500.0]), condition)
        hint = {"controlnet_cond": torch.rand(1, 3, 64, 64)} if isinstance(net, ControlNetModel) else {}
        forward = net.forward
        net.forward = lambda *_, forward=forward, told=told | hint, **options: forward(**told, **options)
        check_same(net)


def test_a_vae_is_the_same_to_the_bit() -> None:
    vae = copy.deepcopy(family("sd").vae)
    for module in vae.modules():
        for factor in FACTORS:
            if factor in vars(module):
                assert vars(module)[factor] is ONE, "a frozen part is loaded with its divisions"
                setattr(module, factor, 1)
    check_same(vae, torch.randn(1, 3, 32, 32))


def test_what_is_trained_divides_by_nothing() -> None:
    net = family("sd").build_denoiser()
    prepare(net, None, False)
    assert {id(vars(m)[factor]) for m in net.modules() for factor in FACTORS if factor in vars(m)} == {
        id(ONE)
    }


def scaled_block() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, temb_channels=4, groups=4, output_scale_factor=2**0.5)
    return block, (torch.randn(1, 8, 4, 4), torch.randn(1, 4))


def check_factor_stays() -> None:
    block, inputs = scaled_block()
    right = block(*inputs)
    unscale(block)
    assert torch.equal(block(*inputs), right), "a division by another number was left out"


def test_a_factor_other_than_one_stays() -> None:
    check_factor_stays()


def test_catches_a_factor_that_is_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    block, _ = scaled_block()
    monkeypatch.setattr(unscaled, "vars", lambda module: dict.fromkeys(FACTORS, 1), raising=False)
    with pytest.raises(AssertionError, match="left out"):
        check_factor_stays()


def test_nothing_that_is_saved_or_copied_knows_of_it(tmp_path: Any) -> None:
    net = family("sd").build_denoiser()
    names, config = [*net.state_dict()], dict(net.config)
    unscale(net)
    assert [*net.state_dict()] == names and dict(net.config) == config
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert all(vars(m).get(factor) in (None, 1.0) for m in again.modules() for factor in FACTORS)
    assert not any(vars(m).get(factor) is ONE for m in again.modules() for factor in FACTORS)
    block = next(module for module in net.modules() if isinstance(module, ResnetBlock2D))
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), block.to(torch.bfloat16)):
        assert other.output_scale_factor is ONE


def test_a_compiler_leaves_it_out_as_well() -> None:
    block, inputs = scaled_block()
    block.output_scale_factor = 1.0
    right = block(*inputs)
    unscale(block)
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    found = torch.compile(block, backend=backend, fullgraph=True)(*inputs)
    assert torch.equal(found, right) and "div" not in graphs[0]
