"""What every family must do, from its toy twin alone."""

import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sfumato import models
from sfumato.errors import UserError
from sfumato.models.family import Condition, Family
from sfumato.models.loading import quiet
from sfumato.models.texts import bare
from tests.unit.twins import batch_of, change, copy, family, load, twin

ALL = pytest.mark.parametrize("name", models.families())


def trained(part: Family, net: nn.Module) -> tuple[Tensor, Tensor]:
    """One backward pass; x_t and the prediction."""
    batch = batch_of(["a cat", "a dog", ""], [False, False, True])
    latents, condition = part.encode(batch)
    t = torch.tensor([3.0, 500.0, 999.0])
    prediction = part.predict(net, latents, t, condition)
    (prediction - batch.draws.noise).square().mean().backward()
    return latents, prediction


def denoiser(part: Family) -> nn.Module:
    torch.manual_seed(0)
    return part.build_denoiser()


def check_prediction(part: Family, net: nn.Module) -> None:
    latents, prediction = trained(part, net)
    assert prediction.shape == latents.shape == (3, 4, 8, 8), prediction.shape
    assert prediction.isfinite().all()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead, f"no gradient: {dead[:3]}"


@ALL
def test_prediction_has_the_shape_of_x_t_and_every_weight_a_gradient(name: str) -> None:
    check_prediction(family(name), denoiser(family(name)))


@ALL
def test_the_gradient_check_catches_a_condition_that_is_ignored(name: str) -> None:
    class Deaf(models.family_class(name)):  # type: ignore[misc]
        def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            silent = {key: torch.zeros_like(rows) for key, rows in condition.items()}
            return super().predict(net, x_t, t, silent)

    part = Deaf(twin(name), family(name).model, torch.device("cpu"), torch.float32, torch.float32)
    with pytest.raises(AssertionError, match="no gradient"):
        check_prediction(part, denoiser(part))


@ALL
def test_lora_targets_match_linear_layers_of_every_attention(name: str) -> None:
    net = denoiser(family(name))
    layers = [part for part in net.modules() if type(part).__name__ == "Attention"]
    for target in family(name).lora_targets:
        found = [module for path, module in net.named_modules() if path.endswith(f".{target}")]
        assert len(found) == len(layers) > 0
        assert all(isinstance(module, nn.Linear) for module in found)


@ALL
def test_the_twin_is_small(name: str) -> None:
    part = family(name)
    encoders = [value for value in part.parts().values() if isinstance(value, nn.Module)]
    words = sum(encoder.get_input_embeddings().weight.numel() for encoder in encoders)
    total = sum(p.numel() for module in (denoiser(part), part.vae, *encoders) for p in module.parameters())
    assert total - words < 1_200_000, f"{total - words:,}"


@ALL
def test_the_twin_is_a_function_of_its_seed(name: str, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    models.family_class(name).tiny(tmp_path / "again")
    assert torch.equal(state, torch.random.get_rng_state()), "tiny() disturbs torch's generator"
    models.family_class(name).tiny(tmp_path / "other", seed=1)
    file = f"{family(name).learns}/diffusion_pytorch_model.safetensors"
    first, again, other = (
        (path / file).read_bytes() for path in (twin(name), *map(tmp_path.joinpath, ("again", "other")))
    )
    assert first == again != other


@ALL
def test_a_pipeline_draws_and_is_loaded_by_stock_diffusers(name: str, tmp_path: Path) -> None:
    part, net = family(name), denoiser(family(name))
    pipeline = part.assemble(net)
    assert type(pipeline) is part.pipeline and getattr(pipeline, part.learns) is net
    assert pipeline.vae is part.vae, "the frozen parts are shared, not copied"
    assert type(pipeline.scheduler).__name__ == part.facts.components["scheduler"][1]
    inputs = part.prompt_inputs(part.encode_prompts(["a cat"]), part.null_condition())
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    ours = pipeline(**inputs, **options, generator=torch.Generator().manual_seed(0)).images
    pipeline.save_pretrained(tmp_path)
    with quiet():
        stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    stock.set_progress_bar_config(disable=True)
    theirs = stock("a cat", **options, generator=torch.Generator().manual_seed(0)).images
    assert ours.shape == (1, 64, 64, 3) and (ours == theirs).all(), "our inputs draw what the prompt draws"


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_pipeline_samples_the_process_that_was_trained(kind: str, tmp_path: Path) -> None:
    folder = copy("sd", tmp_path)
    change(folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", kind]))
    part = load(folder)
    assert type(part.scheduler()).__name__ == kind
    trained = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    scheduler = part.assemble(part.build_denoiser(), trained).scheduler
    takes = kind in ("DDIMScheduler", "EulerDiscreteScheduler")
    assert type(scheduler).__name__ == (kind if takes else "DDIMScheduler")
    assert {key: scheduler.config[key] for key in trained} == trained
    assert scheduler.config.beta_schedule == "scaled_linear" and not scheduler.config.get(
        "clip_sample", False
    )
    assert scheduler.alphas_cumprod[-1] < 1e-6, "the schedule is not rescaled"
    assert part.scheduler().config.prediction_type == "epsilon", "the folder's own config stays"


STUCK = ("PNDM", "EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")


@pytest.mark.parametrize("kind", [*STUCK, "DDIM", "EulerDiscrete", "UniPCMultistep"])
def test_every_scheduler_steps_a_predicted_sample(kind: str, tmp_path: Path) -> None:
    folder = copy("sd", tmp_path)
    change(
        folder / "model_index.json", lambda index: index.update(scheduler=["diffusers", f"{kind}Scheduler"])
    )
    scheduler = load(folder).scheduler({"prediction_type": "sample"})
    assert type(scheduler).__name__ == ("DDIM" if kind in STUCK else kind) + "Scheduler"
    scheduler.set_timesteps(3)
    assert scheduler.step(torch.zeros(1, 4, 8, 8), scheduler.timesteps[0], torch.ones(1, 4, 8, 8))


@ALL
def test_frozen_parts_are_frozen(name: str) -> None:
    part = family(name)
    modules = [part.vae, *(value for value in part.parts().values() if isinstance(value, nn.Module))]
    for module in modules:
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    latents, condition = part.encode(batch_of(["a cat"]))
    assert not latents.requires_grad and not any(rows.requires_grad for rows in condition.values())


@ALL
def test_weights_in_bf16_get_bf16_inputs_but_whole_timesteps(name: str) -> None:
    part = load(twin(name), torch.bfloat16)
    net = denoiser(part).to(torch.bfloat16)
    seen = {}
    net.time_proj.register_forward_pre_hook(lambda _, inputs: seen.update(t=inputs[0]))
    latents, condition = part.encode(batch_of(["a cat"] * 3))
    t = torch.tensor([257.0, 777.0, 999.0])
    assert latents.dtype == torch.float32
    assert part.predict(net, latents, t, condition).dtype == torch.bfloat16
    assert torch.equal(seen["t"], t), f"timesteps became {seen['t']}"


def test_family_of_no_such_name_or_without_family() -> None:
    with pytest.raises(UserError, match="families: sd, sdxl"):
        models.family_class("flax")
    with pytest.raises(UserError, match="does not end in FAMILY"):
        models.family_class("json.decoder")


def test_a_family_outside_is_found_by_its_dotted_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").write_text("from sfumato.models.sd import FAMILY\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load(twin("sd"), family="elsewhere.mine").pipeline is family("sd").pipeline
    with pytest.raises(UserError, match="StableDiffusionXLPipeline"):
        load(twin("sdxl"), family="elsewhere.mine")


def test_an_import_that_fails_inside_a_family_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_family.py").write_text("import there_is_no_such_module\n")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "inner.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        models.family_class("outer.inner")


def test_loading_says_nothing(tmp_path: Path) -> None:
    script = (
        "import torch; from sfumato import models; from sfumato.config import Model\n"
        f"for folder in ({str(twin('sd'))!r}, {str(twin('sdxl'))!r}):\n"
        "    part = models.load(Model(weights=folder), torch.device('cpu'), torch.float32, torch.float32)\n"
        "    part.assemble(part.build_denoiser())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "" and done.stderr == "", done.stdout + done.stderr


def test_facts_are_read_without_torch() -> None:
    script = (
        "import sys; from sfumato.models.folder import examine, families; from sfumato.config import Model\n"
        f"print(families(), examine(Model(weights={str(twin('sd'))!r})).vae_factor)\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "['sd', 'sdxl'] 8\n", done.stderr


@pytest.mark.parametrize("part", ["", "text_encoder.", "text_encoder_2."])
def test_a_name_of_clips_is_the_same_whatever_stands_before_it(part: str) -> None:
    for inner in ("encoder.layers.0.mlp.fc1.weight", "text_projection.weight"):
        assert bare(f"{part}text_model.{inner}") == bare(part + inner) == part + inner
    assert bare("unet.text_model_like.weight") == "unet.text_model_like.weight"
