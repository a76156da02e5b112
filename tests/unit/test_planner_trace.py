"""What the planner's trace foretells, against steps measured on real tensors, and published counts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sfumato import methods
from sfumato.config import Config, parse
from sfumato.methods import Full
from sfumato.models.quantized import quantize
from sfumato.planner import kernels
from sfumato.planner import trace as tracing
from sfumato.planner.architectures import facts_of
from sfumato.planner.kernels import Kernels
from sfumato.planner.meter import Amount, Meter
from sfumato.planner.trace import Cost, Stage, rehearse, trace
from tests.unit import twins
from tests.unit.measured import CPU, Step, peak

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SMALL, LARGE = (64, 64), (256, 256)
LORA = {"kind": "lora", "rank": 4}


def config(weights: str, **changes: Any) -> Config:
    """A run's settings; changes are dotted with double underscores."""
    values: dict[str, Any] = {
        "steps": 1,
        "batch_size": 1,
        "model": {"weights": weights},
        "data": {"source": "pictures", "cache": "both", "conditioning_column": "hint"},
        "engine": {"precision": "fp32"},
    }
    for key, value in changes.items():
        table, _, leaf = key.rpartition("__")
        (values.setdefault(table, {}) if table else values)[leaf] = value
    return parse(values)


def twin(family: str, **changes: Any) -> Config:
    return config(str(twins.twin(family)), **changes)


def planned(settings: Config, size: tuple[int, int]) -> Cost:
    return trace(settings, facts_of(settings.model), size)


def check(foretold: int, measured: int, share: float = 0.03) -> None:
    """The planner promises 10 %; on a CPU nothing explains more than 3."""
    assert abs(foretold / measured - 1) < share, f"foretold {foretold:,} bytes, measured {measured:,}"


def check_kept(settings: Config, cost: Cost, size: tuple[int, int] = SMALL, counts: Any = (1, 3)) -> None:
    step = Step(settings, CPU)
    for count in counts:
        check(cost.fixed + count * cost.activations, step.kept(size, count))


METHODS = {
    "full": {},
    "lora": {"method": LORA},
    "dora": {"method": LORA | {"dora": True}},
    "controlnet": {"method": {"kind": "controlnet"}},
    "text": {"method": {"kind": "full", "text_encoders": True}, "data__cache": "images"},
    "word": {"method": {"kind": "textual_inversion"}, "data__cache": "none"},
}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_what_is_kept_is_what_autograd_saves(family: str) -> None:
    """Micro-batches of 1 and 3, every method; checkpointing and precisions take turns, all pairs meet."""
    for turn, changes in enumerate(METHODS.values()):
        changes = changes | {"engine__gradient_checkpointing": (turn + (family == "sd")) % 2 == 0}
        precision = ("fp32", "bf16")[(turn // 2 + (family == "sd")) % 2]
        settings = twin(family, engine__precision=precision, **changes)
        check_kept(settings, planned(settings, SMALL))


def test_what_selective_checkpointing_keeps_beside_autograd_counts() -> None:
    every, some, least = (
        planned(twin("sd", engine__gradient_checkpointing=way), SMALL) for way in (False, "selective", True)
    )
    assert 1.2 * least.activations < some.activations < every.activations
    assert some.activations > 0.8 * (some.step_peak(2) - some.step_peak(1))


def test_stage_0_keeps_the_casts_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU autocast raises no normalisation to fp32, on CUDA it does: the rule is a list."""
    settings = twin("sd", engine__precision="bf16", engine__zero_stage=0)
    monkeypatch.setattr(tracing, "Kernels", lambda lower=None: Kernels(lower, frozenset()))
    kept = rehearse(Stage(settings, facts_of(settings.model)), SMALL).kept
    step = Step(settings, CPU)
    for count in (1, 3):
        check(kept.of(count), step.kept(SMALL, count))
    cost = planned(settings, SMALL)
    assert cost.fixed > 0.9 * 2 * sum(map(prod, cost.trained.values())), "no casts of the weights"


@pytest.fixture(scope="module")
def mid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD with a U-Net of 77 million weights, which lie in no file."""
    folder = twins.write("sd", tmp_path_factory.mktemp("mid"))
    sizes = {"block_out_channels": [96, 192, 384, 384], "cross_attention_dim": 32}
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **sizes}))
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_of_middle_size(mid: Path, checkpointing: bool) -> None:
    settings = config(str(mid), model__from_scratch=True, engine__gradient_checkpointing=checkpointing)
    cost = planned(settings, LARGE)
    assert 50e6 < sum(map(prod, cost.trained.values())) < 100e6
    check_kept(settings, cost, LARGE, (1, 3) if checkpointing else (1,))


@pytest.mark.parametrize("changes", [{}, {"engine__gradient_checkpointing": True}, {"data__cache": "none"}])
def test_the_peak_is_what_the_allocator_gives(changes: dict[str, Any]) -> None:
    settings = twin("sd", data__conditioning_column=None, **changes)
    cost = planned(settings, LARGE)
    check(cost.step_peak(2), peak(Step(settings, CPU), LARGE, 2), 0.1)


def test_what_is_computed_again_is_not_the_models() -> None:
    """Also where a layer's own autograd.Function computes again, without gradients."""
    found = set()
    for bits, checkpointing in product((None, 4, 8), (False, True, "selective")):
        held = {"engine__precision": "bf16", "engine__gradient_checkpointing": checkpointing}
        cost = planned(twin("sdxl", method=LORA | {"base_bits": bits}, **held), SMALL)
        found.add(cost.model_flops)
        assert (cost.flops > cost.model_flops) == (checkpointing is True)
    assert len(found) == 1


class Twice(Meter):
    """Counts a storage as often as it is saved."""

    @contextmanager
    def keeping(self, found: dict[int, Amount], every: bool = False) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor:
            held = self.number(tensor) < 0
            found[len(found)] = self.amount(0 if held else tensor.untyped_storage().nbytes())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def test_broken_counts_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, size = twin("sd"), (128, 128)
    checkpointed = twin("sd", engine__gradient_checkpointing=True)
    facts, real = facts_of(settings.model), Step(settings, CPU).kept(size, 1)
    check(rehearse(Stage(settings, facts), size).kept.of(1), real)
    with pytest.raises(AssertionError):
        check(planned(settings, size).activations, Step(checkpointed, CPU).kept(size, 1), 0.1)
    with monkeypatch.context() as broken, pytest.raises(AssertionError):
        broken.setattr(tracing, "Meter", Twice)
        check(rehearse(Stage(settings, facts), size).kept.of(1), real, 0.1)
    with monkeypatch.context() as broken, pytest.raises(AssertionError):
        broken.setattr(kernels, "attention", torch.nn.functional.scaled_dot_product_attention)
        check(rehearse(Stage(settings, facts), size).kept.of(1), real, 0.1)


def test_a_meter_changes_no_number() -> None:
    """Answers are remembered by shape where there are no numbers, and nowhere else."""
    with Meter() as meter:
        said = [bool(torch.tensor(x)) for x in (False, True)] + [torch.tensor(x).item() for x in (1.0, 2.0)]
        gradients = []
        for seed in (0, 1):
            weight = nn.Parameter(torch.full((8, 8), seed + 1.0))
            meter.backward((torch.ones(2, 8) @ weight).square().sum(), [weight])
            gradients.append(weight.grad)
    assert said == [False, True, 1.0, 2.0]
    assert [float(g.unique()) for g in gradients if g is not None] == [32.0, 64.0]
    assert meter.flops.of(1) == 2 * 2 * (2 * 2 * 8 * 8)


def test_a_new_method_is_planned_without_new_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Biases(Full):
        def build(self) -> Any:
            parts = super().build()
            for name, parameter in parts.named_parameters():
                parameter.requires_grad_(name.endswith(".bias"))
            return parts

    monkeypatch.setitem(methods.METHODS, "full", Biases)
    settings = twin("sd", seed=1, data__store="elsewhere")  # its own place in the memory of traces
    cost = planned(settings, SMALL)
    assert cost.trained and all(name.endswith(".bias") for name in cost.trained)
    assert cost.frozen["unet"] == cost.sharded > 0
    check_kept(settings, cost)


def test_frozen_parts_are_those_that_a_run_holds() -> None:
    both, none = (planned(twin("sdxl", data__cache=cache), SMALL) for cache in ("both", "none"))
    assert not both.frozen and both.encode_flops == 0
    assert set(none.frozen) == {"vae", "text_encoder", "text_encoder_2"} and none.sharded == 0
    real = Step(twin("sdxl", data__cache="none"), CPU).family
    for name, part in {"vae": real.vae, **real.text_encoders}.items():
        there = sum(t.nbytes for t in (*part.parameters(), *part.buffers()))
        assert none.frozen[name] == there, name
    assert none.encode_flops > 0 and none.activations == both.activations
    shown = {"prompts": ["a cat"]}
    assert planned(twin("sdxl", preview=shown), SMALL).frozen == none.frozen, "previews load the encoders"


def test_layers_of_few_bits_take_their_bytes() -> None:
    def net(device: str) -> nn.Sequential:
        with torch.device(device):
            layers = nn.Sequential(nn.Linear(1280, 320), nn.Linear(320, 128, bias=False))
        return layers.bfloat16().requires_grad_(False)

    for bits in (4, 8):
        real, sized = net("cpu"), net("meta")
        quantize(real, bits)
        quantize(sized, bits)
        there = 0
        for layer in real:
            weight: Any = layer.weight
            scales = [weight.SCB] if bits == 8 else [weight.quant_state.absmax, weight.quant_state.code]
            if bits == 4:
                scales += [weight.quant_state.state2.absmax, weight.quant_state.offset]
            there += sum(t.nbytes for t in (weight, layer.bias, *scales) if t is not None)
        assert tracing.frozen_bytes(sized) == there


COUNTS = {  # millions of weights: denoiser, VAE, text encoders
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859.52, 83.65, [123.06]),
    "stabilityai/stable-diffusion-2-1": (865.91, 83.65, [340.39]),
    SDXL: (2567.46, 83.65, [123.06, 694.66]),
}


def test_published_architectures_have_their_weights_and_need_no_file() -> None:
    for weights, (denoiser, vae, texts) in COUNTS.items():
        settings = config(weights)
        family = tracing.bare_family(settings, facts_of(settings.model))
        with torch.device("meta"):
            found = [family.build_denoiser(), family.vae, *family.text_encoders.values()]
        numbers = [sum(p.numel() for p in part.parameters()) for part in found]
        assert [round(number / 1e6, 2) for number in numbers] == [denoiser, vae, *texts], weights
        assert facts_of(settings.model).granularity == (32 if weights == SDXL else 64)


def taken(changes: dict[str, Any], weights: str, side: int) -> tuple[Cost, int]:
    """The cost of a published model, and the bytes that a micro-batch of one sample keeps."""
    cost = planned(config(weights, engine__precision="bf16", **changes), (side, side))
    return cost, cost.fixed + cost.activations


def near(found: float, published: float) -> bool:
    return abs(found / published - 1) < 0.01


def test_flops_of_sd15() -> None:
    one, _ = taken({}, "stable-diffusion-v1-5/stable-diffusion-v1-5", 512)
    assert near(one.flops, 2.407e12) and one.flops == one.model_flops


def test_flops_and_activations_of_sdxl_at_1024() -> None:
    changes = {"engine__gradient_checkpointing": True, "data__cache": "none"}
    one, kept = taken(changes, SDXL, 1024)
    assert near(one.flops, 25.443e12) and near(one.model_flops, 20.231e12)
    assert near(one.encode_flops, 4.879e12 + 0.111e12)
    assert near(kept, 0.588e9)
    assert kept < one.step_peak(1) < 2e9


def test_flops_of_lora_and_controlnet_at_1024() -> None:
    one, kept = taken({"method": LORA | {"rank": 16}}, SDXL, 1024)
    assert near(one.flops, 14.188e12) and near(kept, 5.59e9)
    one, kept = taken({"method": {"kind": "controlnet"}}, SDXL, 1024)
    assert near(one.flops, 20.016e12) and near(kept, 6.35e9)
    assert round(sum(map(prod, one.trained.values())) / 1e6) == 1251
