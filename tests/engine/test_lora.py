"""LoRA: starts as the identity, learns alone, is the same at every stage, and stock pipelines load it."""

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from sfumato import methods, models
from sfumato.config import parse
from sfumato.drawing.adapters import add_loras, check_lora
from sfumato.drawing.sources import LORA
from sfumato.engine import checkpoint
from sfumato.engine.engine import Engine
from sfumato.errors import UserError
from sfumato.export import export as export_again
from sfumato.methods.lora import LoRA
from sfumato.methods.method import Method, Trained
from sfumato.models import quantized
from sfumato.models.quantized import quantize
from sfumato.models.texts import bare
from tests.engine import runs, toys
from tests.engine.ranks import run_ranks

RULES: dict[str, dict[str, Any]] = {
    "plain": {"rank": 4, "alpha": 8.0},
    "dora": {"rank": 2, "dora": True},
    "rslora": {"rank": 4, "alpha": 2.0, "rslora": True, "targets": ["re:.*attn2.*to_[kv]", "to_q"]},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_place(tmp_path_factory.mktemp("lora"), "sd", "sdxl")


def settings(place: Path, family: str, rule: str, name: str, **changes: Any) -> dict[str, Any]:
    values = runs.settings(place, family, name=name, **{"optimizer__lr": 1e-2, "steps": 2} | changes)
    return values | {"method": {"kind": "lora"} | RULES[rule]}


def train(jobs: list[dict[str, Any]], world: int = 1, bare: bool = False) -> list[Path]:
    train_them = runs.train_bare if bare else runs.train_all
    return run_ranks(train_them, world, jobs, timeout=280)[0]  # type: ignore[no-any-return]


def unet_answer(net: Any) -> torch.Tensor:
    """The denoiser's answer to fixed inputs."""
    draw = torch.Generator().manual_seed(5)
    width = net.config.cross_attention_dim
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 77, width, generator=draw)
    added = {"text_embeds": torch.randn(2, 40, generator=draw), "time_ids": torch.full((2, 6), 64.0)}
    more = {"added_cond_kwargs": added} if net.config.addition_embed_type else {}
    with torch.no_grad():
        return net(x, torch.tensor([3.0, 700.0]), text, **more).sample  # type: ignore[no-any-return]


def live(export: Path, weights: str = "weight") -> Any:
    """The denoiser as it was when training ended: base and adapters put together by hand, in float64.

    W + scale * B @ A, which is what a LoRA means (arXiv:2106.09685); for layers without DoRA.
    """
    folder = export.parent / "checkpoints"
    saved = checkpoint.Saved(checkpoint.path_of(folder, checkpoint.steps_in(folder)[-1]))
    config = parse(saved.state["config"])
    rule = config.method
    net = UNet2DConditionModel.from_pretrained(Path(config.model.weights) / "unet")
    alpha = rule.alpha or rule.rank
    scale = alpha / (rule.rank**0.5 if rule.rslora else rule.rank)
    layers = dict(net.named_modules())
    for name in saved.parameters:
        if ".lora_A." in name:
            a = saved.whole(weights, name).double()
            b = saved.whole(weights, name.replace(".lora_A.", ".lora_B.")).double()
            layer = layers[name.split(".lora_A.")[0].removeprefix("unet.")]
            layer.weight.data = (layer.weight.double() + scale * (b @ a)).float()
    return net


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("rule", list(RULES))
def test_it_starts_as_the_identity(place: Path, family: str, rule: str) -> None:
    config = parse(settings(place, family, rule, "start"))
    part = models.load(config.model, torch.device("cpu"), torch.float32, torch.float32)
    method = methods.build(config, part)
    base = UNet2DConditionModel.from_pretrained(place / family / "unet")
    parts = method.build()
    learns = {name for name, p in parts.named_parameters() if p.requires_grad}
    drawn = method.draw(7)
    assert drawn.keys() == learns and all("lora_" in name for name in learns)
    with torch.no_grad():
        for name, parameter in parts.named_parameters():
            source = method.source_name(name).removeprefix("unet.")
            parameter.copy_(drawn[name] if name in learns else base.get_parameter(source))
    torch.testing.assert_close(unet_answer(parts["unet"]), unet_answer(base), atol=1e-6, rtol=1e-5)
    assert any(bool(p.abs().sum()) for name, p in drawn.items() if "lora_A" in name)
    assert all(torch.equal(drawn[name], again) for name, again in method.draw(7).items())
    assert any(not torch.equal(drawn[name], other) for name, other in method.draw(8).items())


@pytest.fixture(scope="module")
def exports(place: Path) -> dict[tuple[str, str], Path]:
    """By family and rule; what lies there is not to be changed."""
    told = [(family, rule) for family in ("sd", "sdxl") for rule in ("plain", "rslora")]
    jobs = [settings(place, family, rule, f"{family}-{rule}", ema__enabled=False) for family, rule in told]
    return dict(zip(told, train(jobs), strict=True))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_t13_stock_pipelines_load_both_files(
    place: Path, exports: dict[tuple[str, str], Path], family: str
) -> None:
    """The scale, the names, and the base: what is loaded is W + scale * B @ A, and what was trained."""
    for rule in ("plain", "rslora"):
        export = exports[family, rule]
        expected = unet_answer(live(export))
        base = unet_answer(UNet2DConditionModel.from_pretrained(place / family / "unet"))
        assert (expected - base).abs().max() > 1e-3, "nothing was learned"
        for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
            pipeline = DiffusionPipeline.from_pretrained(place / family, safety_checker=None)
            pipeline.load_lora_weights(export, weight_name=file)
            gap = (unet_answer(pipeline.unet) - expected).abs().max()
            assert gap < 1e-5, f"{rule} through {file} is off by {gap}"
            pipeline.fuse_lora()
            assert (unet_answer(pipeline.unet) - expected).abs().max() < 1e-5


def test_an_export_that_leaves_something_out_is_caught(
    exports: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(LoRA):
        def export(self, trained: Trained, *where: Any) -> None:
            super().export({name: trained[name] for name in [*trained][1:]}, *where)

    run = exports["sd", "plain"]
    monkeypatch.setitem(methods.METHODS, "lora", Forgetful)
    with pytest.raises(AssertionError, match="the export left out"):
        export_again(run.parent, tmp_path / "again", anew=True)
    assert not (tmp_path / "again").exists()


def test_t13_catches_a_scale_that_is_lost(
    place: Path, exports: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    export = exports["sd", "plain"]
    tensors = load_file(export / "pytorch_lora_weights.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")  # without its metadata alpha is taken for the rank
    pipeline = DiffusionPipeline.from_pretrained(place / "sd", safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name="bare.safetensors")
    assert (unet_answer(pipeline.unet) - unet_answer(live(export))).abs().max() > 1e-4


def test_every_stage_learns_the_same_and_resumes(place: Path) -> None:
    """One rank at stage 0, and two at 1, 3, and with DoRA at 2, where the run is stopped in the middle."""
    one, dora = train(
        [settings(place, "sd", rule, f"one-{rule}", engine__zero_stage=0) for rule in ("plain", "dora")]
    )
    jobs = [settings(place, "sd", "plain", f"two-{stage}", engine__zero_stage=stage) for stage in (1, 3)]
    halves = [settings(place, "sd", "dora", "half", steps=steps, engine__zero_stage=2) for steps in (1, 2)]
    *others, _, resumed = train([*jobs, *halves], 2)
    assert all("lora_" in name for name in runs.tensors_of(one.parent)), "the checkpoint holds what is frozen"
    for expected, export in (*((one, other) for other in others), (dora, resumed)):
        assert toys.distance(runs.tensors_of(export.parent), runs.tensors_of(expected.parent)) < 1e-5
        for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
            assert load_file(export / file).keys() == load_file(expected / file).keys()
    pipeline = DiffusionPipeline.from_pretrained(place / "sd", safety_checker=None)
    pipeline.load_lora_weights(dora)
    drawn = pipeline("x", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert np.isfinite(drawn).all()


def write_dora(place: Path, folder: Path) -> Method:
    """An export of random numbers, of linear layers and convolutions; its method."""
    config = parse(settings(place, "sd", "dora", "loaded"))
    rule = config.method.model_copy(update={"text_encoders": True, "targets": ("to_q", "conv1", "q_proj")})
    config = config.model_copy(update={"method": rule})
    cpu = torch.device("cpu")
    method = methods.build(config, models.load(config.model, cpu, torch.float32, torch.float32))
    draw = torch.Generator().manual_seed(3)
    learned = {name: t + torch.rand(t.shape, generator=draw) for name, t in method.draw(7).items()}
    folder.mkdir()
    method.export(learned, folder, torch.float32, {})
    return method


def decomposed(weight: torch.Tensor, tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """What a DoRA under kohya's names makes of a weight: W + scale * B @ A, with the lengths that it says.

    The lengths are multiplied as they lie there, as LyCORIS does it, and ComfyUI.
    """
    up, down, lengths = (
        tensors[f"{key}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "dora_scale")
    )
    change = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    whole = weight + change * tensors[f"{key}.alpha"] / len(down)
    norm = whole.flatten(1).norm(dim=1).view(-1, *[1] * (whole.ndim - 1))
    return whole * (lengths / norm)


def test_a_dora_is_loaded_as_it_was_learned(place: Path, tmp_path: Path) -> None:
    """Of both files all lengths, the text encoder's too; one that diffusers leaves out is told."""
    method = write_dora(place, tmp_path / "export")
    file, kohya = tmp_path / "export" / LORA, tmp_path / "export" / "kohya.safetensors"
    base, loaded, again, low = (
        DiffusionPipeline.from_pretrained(place / "sd", safety_checker=None, torch_dtype=kind)
        for kind in (*[torch.float32] * 3, torch.bfloat16)
    )
    loaded.load_lora_weights(tmp_path / "export", weight_name=LORA)
    loaded.fuse_lora()
    tensors = load_file(kohya)
    assert isinstance(method, LoRA)
    for part, names in method.targets.items():
        for name in names:
            layer = base.components[part].get_submodule(name)
            key = f"{method.kohya_part(part)}_{bare(name).replace('.', '_')}"
            found = loaded.components[part].get_submodule(name).base_layer.weight
            expected = decomposed(layer.weight, tensors, key)
            assert (expected - layer.weight).abs().max() > 0.1, "nothing was learned"
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for pipeline in (again, low):
        add_loras(pipeline, [(file, 1.0)])
    with pytest.raises(UserError, match="would leave out its DoRA(.|\n)*name the run's folder"):
        check_lora(kohya, place / "sd")
    ending = ("lora_magnitude_vector.weight", "lora_magnitude_vector")
    save_file({name.replace(*ending): t for name, t in load_file(file).items()}, tmp_path / LORA)
    with pytest.raises(UserError, match=r"diffusers leaves out text_encoder\."):
        add_loras(base, [(tmp_path / LORA, 1.0)])


def test_bf16_over_a_bf16_base(place: Path) -> None:
    [low, high] = train(
        [
            settings(place, "sdxl", "plain", p, engine__precision=p, engine__zero_stage=2)
            for p in ("bf16", "fp32")
        ],
        bare=True,
    )
    gap = toys.distance(runs.tensors_of(low.parent), runs.tensors_of(high.parent))
    assert 0 < gap < 0.1
    values = torch.cat([t.flatten() for t in runs.tensors_of(low.parent).values()])
    assert not torch.equal(values, values.bfloat16().float()), "the adapters' masters are not fp32"


def test_a_target_that_matches_nothing_is_told(place: Path) -> None:
    config = parse(settings(place, "sd", "plain", "bad") | {"method": {"kind": "lora", "targets": ["to_qq"]}})
    part = models.load(config.model, torch.device("cpu"), torch.float32, torch.float32)
    with pytest.raises(UserError, match=r'(?s)"to_qq".*to_q'):
        methods.build(config, part)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": {"zero_stage": 3}, "method": {"kind": "lora", "dora": True}}, "take stage 2"),
        ({"method": {"kind": "lora", "rank": 0}}, "rank = 0"),
        ({"method": "lore"}, "lore"),
    ],
)
def test_settings_that_cannot_be(place: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(runs.settings(place) | changes)


BITS = (8, 4)


def test_over_a_base_of_few_bits(place: Path) -> None:
    """It learns about what it learns over the whole base, and its step 0 is the packed base's."""
    jobs = [
        settings(place, "sd", "plain", f"bits-{bits}", engine__zero_stage=2, ema__enabled=False)
        for bits in (None, *BITS)
    ]
    for job, bits in zip(jobs, (None, *BITS), strict=True):
        job["method"]["base_bits"] = bits
    whole, *packed = (runs.metrics(export.parent) for export in train(jobs, bare=True))
    for lines in packed:
        losses = [line["loss"] for line in lines]
        assert losses != [line["loss"] for line in whole]
        assert losses == pytest.approx([line["loss"] for line in whole], rel=0.05)


def check_packed(job: dict[str, Any]) -> None:
    """A run in which nothing holds on to a weight that was packed."""
    packed: list[weakref.ref[torch.Tensor]] = []
    real, step = quantized.quantize, Engine.step

    def seen(net: torch.nn.Module, bits: int) -> None:
        before = [layer for layer in net.modules() if type(layer) is torch.nn.Linear]
        weights = [
            layer.weight for layer in before if layer.weight.numel() and not layer.weight.requires_grad
        ]
        real(net, bits)
        kept = {id(parameter) for parameter in net.parameters()}
        packed.extend(weakref.ref(weight) for weight in weights if id(weight) not in kept)

    def stepped(self: Engine) -> bool:
        gc.collect()
        assert packed and not any(weight() is not None for weight in packed), "whole weights are kept"
        return step(self)

    quantized.quantize, Engine.step = seen, stepped  # type: ignore[assignment, method-assign]
    runs.train_bare([job])


@pytest.mark.parametrize("stage", [0, 2])
def test_a_packed_base_takes_the_place_of_the_whole_one(place: Path, stage: int) -> None:
    job = settings(place, "sd", "plain", f"packed-{stage}", engine__zero_stage=stage, ema__enabled=False)
    job["method"]["base_bits"] = 4
    run_ranks(check_packed, 1, job, timeout=200)


def linear_bytes(net: torch.nn.Module) -> int:
    """The bytes of all frozen weights of layers that pack."""
    return sum(
        layer.weight.numel() * layer.weight.element_size()
        for layer in net.modules()
        if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad and layer.in_features == 64
    )


@pytest.mark.parametrize("bits", BITS)
def test_packed_layers_compute_with_the_numbers_that_they_hold(place: Path, bits: int) -> None:
    """Against layers of the same numbers unpacked by bitsandbytes; they take 1/4 or 1/8 of fp32's room."""
    functional: Any = pytest.importorskip("bitsandbytes").functional
    net = UNet2DConditionModel.from_pretrained(place / "sd" / "unet").requires_grad_(False).train()
    before, plain = linear_bytes(net), {name: p.clone() for name, p in net.named_parameters()}
    exact = unet_answer(net)
    quantize(net, bits)
    assert linear_bytes(net) == before * bits // 32
    again = UNet2DConditionModel.from_pretrained(place / "sd" / "unet")
    with torch.no_grad():
        for name, layer in net.named_modules():
            if type(layer).__name__ == "Linear4bit":
                unpacked = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            elif type(layer).__name__ == "Linear8bitLt":
                unpacked = layer.weight.CB.float() * layer.weight.SCB.view(-1, 1) / 127
            else:
                continue
            again.get_parameter(f"{name}.weight").copy_(unpacked)
    found, answer = unet_answer(net), unet_answer(again)
    # LLM.int8 rounds its inputs to 8 bits as well.
    assert (found - answer).abs().max() < (1e-4 if bits == 4 else 0.03)
    assert 1e-3 < (found - exact).abs().max() < 0.5
    assert all(torch.equal(p, plain[name]) for name, p in net.named_parameters() if p.dtype == torch.float32)


def test_few_bits_without_the_package_or_at_stage_3(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(place, "sd", "plain", "none")
    asked["method"]["base_bits"] = 4
    config = parse(asked)
    part = models.load(config.model, torch.device("cpu"), torch.float32, torch.float32)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"sfumato\[bits\]"):
        methods.build(config, part)
    asked["engine"]["zero_stage"] = 3
    with pytest.raises(UserError, match="take stage 2"):
        parse(asked)
