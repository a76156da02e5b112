"""ControlNet: starts as its base, learns alone, and computes what diffusers' own classes compute."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from sfumato import config, methods
from sfumato.data.batch import Batch
from sfumato.engine.weights import WeightFiles
from sfumato.errors import UserError
from sfumato.methods.controlnet import ControlNet
from sfumato.methods.method import Method
from sfumato.models.folder import examine
from sfumato.models.parts import Parts
from sfumato.objective import Objective
from tests.unit import twins

CAPTIONS, DROPPED = ["a red fox", "two cats", "", "snow"], [False, True, False, False]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def settings(base: Path, weights: Path | None = None) -> config.Config:
    kind = {"kind": "controlnet"} | ({} if weights is None else {"weights": str(weights)})
    data = {"source": "none", "conditioning_column": "hint"}
    values = {"steps": 1, "batch_size": 4, "model": {"weights": str(base)}, "method": kind, "data": data}
    return config.parse(values)


def method_of(name: str, weights: Path | None = None, kind: type[ControlNet] = ControlNet) -> ControlNet:
    return kind(twins.family(name), settings(twins.twin(name), weights))


def filled(method: Method, place: Path) -> Parts:
    """The parts with the numbers that a run would start from."""
    parts, files = method.build(), dict(method.weights())
    if drawn := method.draw(7):
        save_file(drawn, place / "random.safetensors")
        files[""] = [place / "random.safetensors"]
    read = WeightFiles(files, method.source_name)
    read.check(parts)
    with torch.no_grad():
        for name, p in parts.named_parameters():
            p.copy_(read(name, 0, p.numel()).view(p.shape))
    return parts


def batch() -> Batch:
    """Four samples with second images of four kinds."""
    found = twins.batch_of(CAPTIONS, DROPPED, seed=3)
    return replace(found, hint=torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(9)))


def base_of(name: str) -> Any:
    """The denoiser from its files. In training mode, because evaluation sums in another order on CPUs."""
    return UNet2DConditionModel.from_pretrained(twins.twin(name) / "unet").train()


def write_control(folder: Path, base: Path) -> Path:
    """A ControlNet with random numbers where a new one has zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(base / "unet"))
        for name, parameter in net.named_parameters():
            if name.startswith("controlnet_") and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(folder)
    return folder


def ours(method: Method, parts: Parts, found: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Each sample's loss, and the gradients by name."""
    latents, condition = method.encode(found)
    objective = Objective(method.config.objective, method.family.scheduler_config)
    losses = objective.losses(lambda x, t: parts(x, t, condition), latents, found.draws)
    parts.zero_grad()
    losses.mean().backward()
    learned = {name: p.grad for name, p in parts.named_parameters() if p.grad is not None}
    return losses.detach(), {name.removeprefix("controlnet."): grad for name, grad in learned.items()}


def theirs(name: str, net: Any, found: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, as diffusers' example computes it (examples/controlnet, one step)."""
    family, base = twins.family(name), base_of(name)
    scheduler: Any = family.scheduler()
    draws = found.draws
    times = (draws.timestep * scheduler.config.num_train_timesteps).long()
    latents = family.encode_images(found)
    noisy = scheduler.add_noise(latents, draws.noise, times)
    if name == "sdxl":  # Euler's add_noise is in another scale
        kept = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * draws.noise
    told = family.condition(found)
    extra = {}
    if name == "sdxl":
        extra = {"added_cond_kwargs": {"text_embeds": told["pooled"], "time_ids": found.size_and_crop}}
    said = {"encoder_hidden_states": told["context"], **extra}
    answer = net(noisy, times, controlnet_cond=found.hint, **said)
    predicted = base(
        noisy,
        times,
        down_block_additional_residuals=answer.down_block_res_samples,
        mid_block_additional_residual=answer.mid_block_res_sample,
        **said,
    ).sample
    losses = F.mse_loss(predicted, draws.noise, reduction="none").mean((1, 2, 3))
    losses.mean().backward()
    return losses.detach(), {key: p.grad for key, p in net.named_parameters() if p.grad is not None}


def check_equal(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], two[0], rtol=1e-5, atol=1e-6)
    assert one[1].keys() == two[1].keys(), "others learn"
    for key, grad in one[1].items():
        torch.testing.assert_close(grad, two[1][key], rtol=1e-4, atol=1e-6, msg=key)


def check_start(method: Method, parts: Parts, base: Any) -> None:
    """Only the ControlNet learns, and the answer is the base's to the bit."""
    found = batch()
    latents, condition = method.encode(found)
    t = torch.tensor([3.0, 700.0, 40.0, 999.0])
    told = {name: rows for name, rows in condition.items() if name != "hint"}
    with torch.no_grad():
        assert torch.equal(parts(latents, t, condition), method.family.predict(base, latents, t, told))
    for name, p in parts.named_parameters():
        assert p.requires_grad == name.startswith("controlnet."), name


def test_it_starts_as_the_base_and_learns_alone(name: str, tmp_path: Path) -> None:
    method = method_of(name)
    parts = filled(method, tmp_path)
    base = base_of(name)
    check_start(method, parts, base)
    expected = ControlNetModel.from_unet(base).state_dict()
    found = parts["controlnet"].state_dict()
    assert found.keys() == expected.keys()
    for key, numbers in expected.items():
        if "cond_embedding" not in key:
            assert torch.equal(found[key], numbers), key
    with torch.no_grad():
        mine: Any = parts["controlnet"]
        assert float(mine.controlnet_cond_embedding.conv_in.weight.std()) > 0.05
        assert not mine.controlnet_cond_embedding(torch.rand(1, 3, 64, 64)).any()
        one, again, other = method.draw(7), method.draw(7), method.draw(8)
        assert all(torch.equal(one[key], again[key]) for key in one)
        key = "controlnet.controlnet_cond_embedding.conv_in.weight"
        assert not torch.equal(one[key], other[key])


@pytest.mark.parametrize("wrong", ["base", "start"])
def test_the_start_catches(wrong: str, tmp_path: Path) -> None:
    class Broken(ControlNet):
        def build(self) -> Parts:
            parts = super().build()
            if wrong == "base":
                parts["unet"].get_parameter("conv_out.bias").requires_grad_(True)
            return parts

        def draw(self, seed: int) -> dict[str, Tensor]:
            key = "controlnet.controlnet_mid_block.bias"
            drawn = super().draw(seed)
            return drawn | ({key: drawn[key] + 1e-6} if wrong == "start" else {})

    method = method_of("sd", kind=Broken)
    base = base_of("sd")
    with pytest.raises(AssertionError):
        check_start(method, filled(method, tmp_path), base)


@pytest.mark.parametrize("given", [False, True])
def test_loss_and_gradients_equal_diffusers(name: str, given: bool, tmp_path: Path) -> None:
    start = write_control(tmp_path / "given", twins.twin(name)) if given else None
    method = method_of(name, start)
    parts = filled(method, tmp_path)
    net = ControlNetModel.from_unet(base_of(name))
    net.load_state_dict(parts["controlnet"].state_dict())
    check_equal(ours(method, parts, batch()), theirs(name, net, batch()))


@pytest.mark.parametrize("wrong", ["range", "shuffled", "mirrored", "not added", "not dropped"])
def test_the_comparison_catches(wrong: str, tmp_path: Path) -> None:
    class Unread(ControlNet):
        def predict(self, parts: Parts, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
            return self.family.predict(parts["unet"], x_t, t, condition) + 0 * parts["controlnet"](
                x_t, t, condition["context"], condition["hint"], return_dict=False
            )[1].sum()  # fmt: skip

    method = method_of("sd", write_control(tmp_path / "given", twins.twin("sd")))
    parts, good = filled(method, tmp_path), batch()
    assert good.hint is not None
    net = ControlNetModel.from_pretrained(tmp_path / "given")
    net.train()
    bad = {
        "range": replace(good, hint=good.hint * 2 - 1),
        "shuffled": replace(good, hint=good.hint.roll(1, 0)),
        "mirrored": replace(good, hint=good.hint.flip(-1)),
        "not dropped": replace(good, dropped=torch.zeros(4, dtype=torch.bool)),
    }.get(wrong, good)
    if wrong == "not added":
        method = method_of("sd", tmp_path / "given", Unread)
        parts = filled(method, tmp_path)
    with pytest.raises(AssertionError):
        check_equal(ours(method, parts, bad), theirs("sd", net, good))


def test_a_batch_without_second_images_is_our_defect() -> None:
    with pytest.raises(AssertionError, match="without second images"):
        method_of("sd").encode(replace(batch(), hint=None))


def refusal(name: str, weights: Any) -> str:
    """What a run of these weights is told before a model is loaded."""
    run = settings(twins.twin(name), weights)
    with pytest.raises(UserError) as told:
        methods.METHODS["controlnet"].check(run, examine(run.model), iter(()))
    return str(told.value)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    other = write_control(tmp_path / "sdxl", twins.twin("sdxl"))
    text = refusal("sd", other)
    assert "cross_attention_dim 64" in text and "32" in text
    assert str(other) in text and str(twins.twin("sd")) in text
    assert "no config.json of a ControlNetModel" in refusal("sd", twins.twin("sd"))
    assert "no such folder" in refusal("sd", tmp_path / "nowhere")
    (other / "diffusion_pytorch_model.safetensors").unlink()
    assert "no such file" in refusal("sdxl", other)
    grey = write_control(tmp_path / "grey", twins.twin("sd"))
    twins.change(grey / "config.json", lambda said: said.update(conditioning_channels=1))
    assert "1 channels" in refusal("sd", grey)


def test_what_fits_is_found_in_runs_and_pipelines_and_counted(tmp_path: Path) -> None:
    for within in ("plain", "run/export", "pipeline/controlnet"):
        folder = write_control(tmp_path / within, twins.twin("sd"))
        run = settings(twins.twin("sd"), tmp_path / within.split("/")[0])
        count = methods.METHODS["controlnet"].check(run, examine(run.model), iter(()))
        assert count == sum(p.numel() for p in ControlNetModel.from_pretrained(folder).parameters())


def test_a_denoiser_without_a_likeness_is_refused(tmp_path: Path) -> None:
    base = twins.copy("sd", tmp_path)
    twins.change(base / "unet" / "config.json", lambda said: said.update(time_embedding_dim=64))
    run = settings(base)
    with pytest.raises(UserError, match=r"time_embedding\S* is .*, \(64, 32\)"):
        methods.METHODS["controlnet"].check(run, examine(run.model), iter(()))
