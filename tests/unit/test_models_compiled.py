"""Blocks that are compiled learn the same, keep their names, and are compiled once for all of a kind."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from sfumato.check.rules import check_compile
from sfumato.config import parse
from sfumato.errors import UserError
from sfumato.models import compiled
from sfumato.models.compiled import compile_blocks
from sfumato.models.denoiser import prepare
from tests.unit.twins import batch_of, family

Step = tuple[float, dict[str, Tensor]]
RULE = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile attention alone, without code for the processor, which would change no more than rounding."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    monkeypatch.setattr(compiled, "KINDS", ())  # diffusers itself names the blocks of attention
    settings: Any = torch._dynamo.config
    with settings.patch(cache_size_limit=8, fail_on_cache_limit_hit=False):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many were compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def denoiser(adapter: bool = False) -> nn.Module:
    """A twin that is trained with checkpointing; adapter: by LoRA."""
    torch.manual_seed(0)
    net: Any = family("sd").build_denoiser()
    if adapter:
        net.requires_grad_(False)
        net.add_adapter(RULE)
    prepare(net, None, True)
    return net.train()  # type: ignore[no-any-return]


def steps(net: nn.Module, side: int = 64) -> list[Step]:
    """Two steps of descent: each loss, and the weights that learn after it."""
    part, found = family("sd"), []
    latents, condition = part.encode(batch_of(["a cat"], side=side))
    learning = {name: p for name, p in net.named_parameters() if p.requires_grad}
    descent = torch.optim.SGD(learning.values(), 0.1)
    for _ in range(2):
        loss = (part.predict(net, latents, torch.tensor([500.0]), condition) - 1).square().mean()
        descent.zero_grad()
        loss.backward()
        descent.step()
        found.append((float(loss.detach()), {name: p.detach().clone() for name, p in learning.items()}))
    return found


def check_same(one: list[Step], other: list[Step]) -> None:
    """Fail unless both learned the same, under the same names, up to rounding."""
    for (loss, weights), (right, theirs) in zip(one, other, strict=True):
        assert loss == pytest.approx(right, rel=1e-4), "another curve"
        assert weights.keys() == theirs.keys(), "other names"
        torch.testing.assert_close(weights, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_compiled_blocks_learn_the_same(adapter: bool) -> None:
    """Attention is compiled once, and with LoRA once more for its first block's input without gradients."""
    right = steps(denoiser(adapter))
    net, before = denoiser(adapter), graphs()
    names, pickled = [*net.state_dict()], {**net.__getstate__()}
    compile_blocks(net, several=False)
    assert graphs() == before, "compiled before it is called"
    check_same(steps(net), right)
    assert 1 <= graphs() - before <= (2 if adapter else 1)
    assert [*net.state_dict()] == names and net.__getstate__().keys() == pickled.keys()
    before = graphs()
    with torch.no_grad():  # a validation, or a preview
        net(torch.zeros(3, 4, 8, 8), 1, torch.zeros(3, 77, 32))
    other = denoiser(adapter)
    for p, theirs in zip(net.parameters(), other.parameters(), strict=True):
        p.data = theirs.detach() * 0.5  # other weights, as an average's for a preview, or a checkpoint's
        theirs.data.mul_(0.5)
    check_same(steps(net), steps(other))
    assert graphs() == before


class Stale(compiled.Compiled):
    """Computes with the weights that were there when it was first called."""

    def __init__(self, block: nn.Module, learning: bool, several: bool) -> None:
        super().__init__(block, learning, several)
        self.block, self.weights = block, dict[str, Tensor]()

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        self.weights = self.weights or {n: p.detach().clone() for n, p in self.block.named_parameters()}
        self.block._compiled_call_impl = None
        found = torch.func.functional_call(self.block, self.weights, inputs, options)
        self.block._compiled_call_impl = self
        return found


def test_catches_blocks_with_weights_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    right, net = steps(denoiser()), denoiser()
    monkeypatch.setattr(compiled, "Compiled", Stale)
    compile_blocks(net, several=False)
    with pytest.raises(AssertionError):
        check_same(steps(net), right)


def test_one_compilation_for_several_sizes_and_an_end_of_those_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    net, before = denoiser(), graphs()
    compile_blocks(net, several=True)
    for side in (64, 128, 192):
        steps(net, side)
    assert graphs() - before == 1
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "VARIANTS", 1)
    torch._dynamo.config.cache_size_limit = 1
    net = denoiser()
    compile_blocks(net, several=False)
    steps(net, 64)
    with pytest.raises(UserError, match="again and again"):
        steps(net, 128)


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"precision": "bf16"}, "cpu", "wrong gradients in bf16"),
        ({}, "npu", "nobody has tried"),
        ({}, "nothing", "a compiler for C"),
    ],
)
def test_check_refuses_what_cannot_be(
    changes: dict[str, Any], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = {"compile": True, "precision": "fp32", "zero_stage": 1}
    run = {"steps": 1, "batch_size": 1, "model": {"weights": "x"}, "data": {"source": "x"}}
    if device == "nothing":
        device, _ = "cpu", monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    else:
        check_compile(parse(run | {"engine": engine}), "cpu")
    with pytest.raises(UserError, match=message):
        check_compile(parse(run | {"engine": engine | changes}), device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"zero_stage": 3}}, "zero_stage = 3 brings weights"),
        ({"engine": {"gradient_checkpointing": "selective"}}, "does not see the operations"),
        ({"engine": {"deepspeed": {"compile": {"deepcompile": False}}}}, "DeepSpeed's own key"),
        ({"method": {"kind": "lora", "base_bits": 8}}, "base_bits = 8 are not torch's"),
    ],
)
def test_a_config_refuses_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    run = {"steps": 1, "batch_size": 1, "model": {"weights": "x"}, "data": {"source": "x"}}
    engine = {"precision": "fp32", **changes.pop("engine", {})}
    parse(run | changes | {"engine": engine})
    with pytest.raises(UserError, match=message):
        parse(run | changes | {"engine": engine | {"compile": True}})


def test_on_a_cpu_convolutions_keep_their_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels last costs a tenth of a step there; on a card inductor decides by itself."""
    import torch._inductor.config as inductor

    for device, kept in (("cuda", True), ("cpu", False)):
        monkeypatch.setattr(inductor, "layout_optimization", True)
        monkeypatch.setattr(compiled, "kind", lambda device=device: device)
        compile_blocks(denoiser(), several=False)
        assert inductor.layout_optimization is kept
