"""Which kernel is the fastest for which layers: the shapes that are timed, the choice, and what it does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sfumato import models
from sfumato.config import Config, parse
from sfumato.config.training import Engine
from sfumato.errors import UserError
from sfumato.models import fastest
from sfumato.models.attention import DispatchedAttention, kind_of, layers_of, try_kernels
from sfumato.models.denoiser import prepare
from sfumato.models.fastest import PLAIN, Found, Work, bare
from tests.unit.test_models_attention import answer, counted
from tests.unit.twins import family, twin

__all__ = ["counted"]
ALL = pytest.mark.parametrize("name", models.families())
CPU = torch.device("cpu")


def config(**engine: Any) -> Config:
    """A run of sd's toy twin."""
    values = {"model": {"weights": str(twin("sd"))}, "data": {"source": "x"}, "engine": engine}
    return parse(values | {"steps": 4, "micro_batch_size": 2, "batch_size": 2})


def unet() -> UNet2DConditionModel:
    """Three sizes, with attention at each, as no toy twin has it."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=8,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=4,
    )


def seen(net: nn.Module, size: tuple[int, int]) -> dict[str, Work]:
    """What layers of attention compute in a real forward pass of two latents with 77 tokens, by kind."""
    found = dict[str, Work]()

    def note(kind: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, options: Any) -> None:
            states, context = inputs[0], options.get("encoder_hidden_states")
            keys = (states if context is None else context).shape[1]
            batch, queries = states.shape[:2]
            work = Work(batch, queries, keys, layer.heads, layer.inner_dim // layer.heads)
            assert found.setdefault(kind, work) == work, f"{kind} is of two shapes"

        return hook

    for path, layer in layers_of(net).items():
        layer.register_forward_pre_hook(note(kind_of(path)), with_kwargs=True)
    net(torch.zeros(2, 4, *size), torch.tensor([3, 7]), encoder_hidden_states=torch.zeros(2, 77, 8))
    return found


@pytest.mark.parametrize("size", [(8, 8), (7, 13)])
def test_the_shapes_that_are_timed_are_those_of_a_forward_pass(size: tuple[int, int]) -> None:
    net = unet()
    planned = fastest.works_of(net, size, 2, 77)
    assert planned == seen(net, size) and len(planned) == 2 * (3 + 1 + 3)
    assert len({(work.queries, work.keys) for work in planned.values()}) == 6
    broken = {kind.replace("up_blocks.0", "up_blocks.2"): work for kind, work in planned.items()}
    assert broken != seen(net, size), "levels counted from the wrong end"


def test_the_denoiser_without_numbers_is_the_models() -> None:
    for name in models.families():
        shapes = {key: tensor.shape for key, tensor in bare(family(name).facts).state_dict().items()}
        right = {key: tensor.shape for key, tensor in family(name).build_denoiser().state_dict().items()}
        assert shapes == right


def chosen(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, Work], float], *sizes: int) -> Found:
    """The choice for sd's toy where kernels take so many seconds; the CPU has "native" and PLAIN."""
    monkeypatch.setattr(fastest, "timed", lambda name, work, *_: seconds(name, work))
    return fastest.fastest(config(), family("sd").facts, [(size, size) for size in sizes], CPU)


def test_every_kind_has_what_is_fastest_over_the_runs_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def text_is_plain(name: str, work: Work) -> float:
        return 1.0 if (name == PLAIN) == (work.keys == 77) else 2.0

    found = chosen(monkeypatch, text_is_plain, 64)
    text = {kind_of(name) for name in layers_of(bare(family("sd").facts)) if name.endswith("attn2")}
    assert found.kernels == dict.fromkeys(text, PLAIN)
    assert found.usual == pytest.approx(1.5 * found.chosen)
    assert f"{PLAIN} for {len(text)} kinds of layer" in str(found)

    def large_ones_lose(name: str, work: Work) -> float:
        return 1.0 if name != PLAIN else 0.5 if work.queries < 64 else 3.0

    small, several = (chosen(monkeypatch, large_ones_lose, *sizes) for sizes in ((32,), (32, 64, 128)))
    assert set(small.kernels) > set(several.kernels) == set(), "the sum of all sizes decides"


def test_what_may_be_chance_or_takes_memory_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, lambda name, _: 0.96 if name == PLAIN else 1.0, 64).kernels == {}
    assert "torch's own choice" in str(chosen(monkeypatch, lambda *_: 1.0, 64))
    large = chosen(monkeypatch, lambda name, _: 0.1 if name == PLAIN else 1.0, 512)
    assert {kind.rpartition(".")[2] for kind in large.kernels} == {"attn2"}, "1,024 keys"


def test_the_plain_one_is_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "probe", lambda *_: None)
    monkeypatch.setattr(fastest, "timed", lambda *_: 1.0)
    work = Work(1, 64, 77, 2, 16)
    devices = torch.device("cpu"), torch.device("cuda")
    tried = [set(fastest.times_of(work, fastest.CANDIDATES, device, torch.float32)) for device in devices]
    assert tried[0] - tried[1] == {PLAIN}


def test_a_kernel_that_cannot_train_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: Any) -> None:
        raise UserError(name, "no gradient", "take another")

    monkeypatch.setattr(fastest, "probe", refuse)
    assert chosen(monkeypatch, lambda name, _: 0.1 if name == PLAIN else 1.0, 64).kernels == {}


def test_a_package_that_fails_in_its_own_way_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first rank times; what it raises must be an error that all ranks hear of."""

    def timed(broken: str) -> Callable[..., float]:
        def seconds(name: str, *_: Any) -> float:
            if name == broken:
                raise FileNotFoundError("no ninja here")
            return 1.0

        return seconds

    work = Work(1, 64, 77, 2, 16)
    monkeypatch.setattr(fastest, "timed", timed(PLAIN))
    assert set(fastest.times_of(work, fastest.CANDIDATES, CPU, torch.float32)) == {"native", "_native_flash"}
    monkeypatch.setattr(fastest, "timed", timed("native"))
    with pytest.raises(UserError, match="no ninja here"):
        fastest.times_of(work, fastest.CANDIDATES, CPU, torch.float32)


def test_selective_checkpointing_computes_no_kernel_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "timed", lambda name, *_: 0.1 if name == PLAIN else 1.0)
    asked = config(gradient_checkpointing="selective")
    assert fastest.fastest(asked, family("sd").facts, [(64, 64)], CPU).kernels == {}
    assert fastest.fastest(config(), family("sd").facts, [(64, 64)], CPU).kernels != {}


def test_timing_leaves_the_runs_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    fastest.timed("native", Work(1, 16, 16, 2, 16), CPU, torch.float32)
    assert torch.equal(before, torch.get_rng_state())


def test_real_times_are_of_real_kernels() -> None:
    """Larger work takes longer; nothing else is certain."""
    small, large = (fastest.timed("native", Work(1, n, n, 2, 16), CPU, torch.float32) for n in (16, 512))
    assert 0 < small < large
    found = fastest.fastest(config(precision="bf16"), family("sd").facts, [(64, 64), (96, 64)], CPU)
    assert 0 < found.chosen <= found.usual and set(found.kernels.values()) <= {PLAIN}


@ALL
def test_each_kind_uses_its_kernel_and_the_answer_is_the_same(name: str, counted: dict[str, int]) -> None:
    right, right_grads, net = answer(name, None, False)
    kinds = sorted({kind_of(path) for path in layers_of(net)})
    mine = {kind: PLAIN for kind in kinds if kind.endswith("attn2")}
    found, grads, used = answer(name, mine, False)  # type: ignore[arg-type]
    paths = [path for path in layers_of(used) if path.endswith("attn2")]
    assert counted == {PLAIN: len(paths)} and len(paths) * 2 == len(layers_of(used))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    for key, gradient in grads.items():
        torch.testing.assert_close(gradient, right_grads[key], rtol=1e-3, atol=1e-6)


def test_the_word_itself_is_torchs_own_choice_where_nothing_was_timed(counted: dict[str, int]) -> None:
    answer("sd", "fastest", False)
    assert counted == {}


def test_what_a_model_has_not_and_what_cannot_train_is_refused() -> None:
    net = bare(family("sd").facts)
    try_kernels({"mid_block.attn1": PLAIN}, net, CPU, torch.float32)
    with pytest.raises(UserError, match="no such layers") as error:
        try_kernels({"middle.attn1": PLAIN}, net, CPU, torch.float32)
    assert "mid_block.attn1" in error.value.do
    with pytest.raises(UserError, match="torch_npu"):  # which package is missing, not what it failed with
        try_kernels("_native_npu", net, CPU, torch.float32)
    with pytest.raises(UserError, match="_native_cudnn"):
        try_kernels({"mid_block.attn2": "_native_cudnn"}, net, CPU, torch.float32)


def test_a_table_by_hand_is_a_setting() -> None:
    table = {"mid_block.attn1": "native"}
    assert config(attention=table).engine.attention == table
    assert Engine().attention is None
    net: nn.Module = family("sd").build_denoiser()
    prepare(net, table, False)
    own = [path for path, layer in layers_of(net).items() if isinstance(layer.processor, DispatchedAttention)]
    assert own and all(kind_of(path) in table for path in own)
