"""The contract of a family of models, and what families share.

A family is one file of this folder that ends in `FAMILY = ...`. Shapes: B samples, H x W pixels, c latent
channels of h x w.
"""

import inspect
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from sfumato import config
from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.models.folder import Facts, examine, read_json
from sfumato.models.identity import fingerprint
from sfumato.models.latents import draw
from sfumato.models.loading import frozen, module_dtype, quiet
from sfumato.models.texts import Condition, Texts

EMPTY: Mapping[str, Any] = MappingProxyType({})
NO_SAMPLES = ("PNDM", "EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
"""diffusers' schedulers that cannot step what predicts the sample."""


class Family(Texts):
    """The frozen parts of a model, how they encode, and how its denoiser is asked.

    `folder`: the weights as `folder.locate` found them. `dtype`: arithmetic of the text encoders. `facts`:
    what the folder says, where that is known and its weights are not looked for.
    Raises UserError for every fault of the folder, those of the frozen parts' files when they are loaded.
    """

    pipeline: ClassVar[type[DiffusionPipeline]]
    """What is loaded, drawn with and exported."""
    control_pipeline: ClassVar[type[DiffusionPipeline] | None] = None
    """What draws with a ControlNet; None where diffusers has no such pipeline."""
    needs: ClassVar[tuple[str, ...]]
    """The folders that the family reads besides the denoiser's, the VAE's and the scheduler's."""
    denoiser_class: ClassVar[type[nn.Module]]
    learns: ClassVar[str] = "unet"
    """The part that is trained, by its name in the folder."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the denoiser's layers that LoRA changes."""

    def __init__(
        self,
        folder: Path,
        model: config.Model,
        device: torch.device,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        facts: Facts | None = None,
    ) -> None:
        self.facts = facts or examine(model.model_copy(update={"weights": str(folder), "revision": None}))
        kinds = (self.facts.pipeline, self.facts.components[self.learns][1])
        if kinds != (wanted := (self.pipeline.__name__, self.denoiser_class.__name__)):
            found = f"{folder} holds {' with '.join(kinds)}, the family is for {' with '.join(wanted)}"
            do = "choose other weights or another model.family"
            raise UserError(f"the family {self.facts.family}", found, do)
        self.folder, self.model, self.device = folder, model, torch.device(device)
        self.scheduler_config = self.facts.scheduler
        self.denoiser_config = self.facts.denoiser
        self.latent_channels, self.vae_factor = self.facts.latent_channels, self.facts.vae_factor
        self.dtype, self.vae_dtype = dtype, vae_dtype
        with quiet():
            self.scheduler()  # a class that cannot be made is told now, not at the first preview

    # The frozen parts, loaded when they are first used: a run that reads a cache may need none of them.

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The VAE, in `vae_dtype`."""
        return self.read_vae(self.vae_dtype)

    def read_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """The VAE from its files."""
        variant = self.model.variant if self.model.vae is None else None
        return frozen(AutoencoderKL, self.facts.vae_folder, variant, dtype, self.device)

    @cached_property
    def vae_config(self) -> Any:
        """The VAE's config, with the defaults of its class; needs no weights."""
        taken = inspect.signature(AutoencoderKL).parameters.values()
        defaults = {each.name: each.default for each in taken if each.default is not each.empty}
        return FrozenDict(defaults | read_json(self.facts.vae_folder / "config.json"))

    def load(self, images: bool = True, captions: bool = True) -> "Family":
        """Load the parts that encode images or captions at once, so that their faults are told at once."""
        _ = images and self.vae
        _ = captions and self.parts()
        return self

    def release(self, *names: str) -> None:
        """Let go of frozen parts, or else of all; they are loaded again when they are needed."""
        for name in names or ("vae", "tokenizers", "text_encoders"):
            self.__dict__.pop(name, None)

    def identity(self, images: bool) -> str:
        """Hash of all that the encoding of images, or else of captions, depends on besides its input."""
        if images:
            return fingerprint([self.facts.vae_folder], [self.vae_dtype])
        settings = sorted(self.facts.settings.items())
        said = [self.dtype, self.facts.family, self.model.prompt_window, settings]
        return fingerprint([self.folder / part for part in self.needs], said)

    # What a family must say.

    def inputs(self, dtype: torch.dtype, x_t: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        """The denoiser's arguments for x_t (B, c, h, w) at timesteps t (B,), which stay fp32."""
        raise NotImplementedError

    def prompt_inputs(self, condition: Condition, null: Condition) -> dict[str, Tensor]:
        """What the pipeline's call takes in place of prompt and negative prompt."""
        raise NotImplementedError

    @staticmethod
    def tiny(folder: Path, seed: int = 0) -> None:
        """Write the family's random toy twin as a diffusers folder."""
        raise NotImplementedError

    # What does not depend on the kind of model.

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's answer (B, c, h, w) to x_t (B, c, h, w) at timesteps t (B,)."""
        return net(**self.inputs(module_dtype(net), x_t, t, condition), return_dict=False)[0]

    def parts(self) -> dict[str, Any]:
        """The pipeline's arguments besides denoiser, VAE and scheduler."""
        words = {part.replace("text_encoder", "tokenizer"): found for part, found in self.tokenizers.items()}
        return {**words, **self.text_encoders}

    # Three image states: pixels -> moments -> latents.

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> the VAE's mean and log-variance, (B, 2c, h, w) fp32."""
        pixels = pixels.to(self.device, self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.parameters.float()  # (B, 2c, h, w)

    @torch.no_grad()
    def safe_moments(self, pixels: Tensor, told: list[int] | None = None) -> Tensor:
        """`moments`, those that are not finite once more in fp32; their rows are added to `told`."""
        found = self.moments(pixels)
        if self.vae_dtype == torch.float32:
            return found
        bad = (~torch.isfinite(found).flatten(1).all(1)).nonzero().flatten()  # (k,)
        if not len(bad):
            return found
        exact = self.read_vae(torch.float32)  # the weights as they are, not as they were rounded
        wrong = pixels.to(self.device)[bad].float()
        found[bad] = exact.encode(wrong).latent_dist.parameters
        if told is not None:
            told += bad.tolist()
        return found

    def latents(self, moments: Tensor, posterior: Tensor) -> Tensor:
        """Moments (B, 2c, h, w), or the mean (B, c, h, w), and unit noise (B, c, h, w) -> scaled latents."""
        return self.scaled(draw(moments.float(), posterior.to(moments.device)))

    def scaled(self, raw: Tensor) -> Tensor:
        """The VAE's latents -> the denoiser's: the inverse of what the pipeline does before it decodes."""
        return raw * self.vae_config.scaling_factor

    # A batch for the objective.

    def encode(self, batch: Batch) -> tuple[Tensor, Condition]:
        """A batch -> latents (B, c, h, w) fp32 and its condition, where dropped samples have the null one."""
        return self.encode_images(batch), self.condition(batch)

    @torch.no_grad()
    def encode_images(self, batch: Batch) -> Tensor:
        """A batch's latents (B, c, h, w) fp32. Where they are not finite, no loss of them will be."""
        moments = batch.moments
        if moments is None:
            assert batch.pixels is not None, "a batch without pixels or moments"
            # The look at them waits for the device, and what has the range of fp32 overflows where fp32 does.
            narrow = torch.finfo(self.vae_dtype).max < 1e38
            moments = self.safe_moments(batch.pixels) if narrow else self.moments(batch.pixels)
        return self.latents(moments.to(self.device), batch.draws.posterior)

    # The denoiser and the pipeline around it.

    def build_denoiser(self) -> nn.Module:
        """The denoiser from its config file, holding random numbers of torch's global generator, in fp32."""
        with quiet():
            return self.denoiser_class.from_config(self.denoiser_config)  # type: ignore[attr-defined]

    def assemble(
        self, denoiser: nn.Module, process: Mapping[str, Any] = EMPTY, controlnet: nn.Module | None = None
    ) -> DiffusionPipeline:
        """The family's pipeline around a denoiser; the frozen parts are shared with it, not copied.

        `process`: what training changed of the scheduler's config, such as prediction_type.
        """
        parts = {self.learns: denoiser, "vae": self.vae, "scheduler": self.scheduler(process)}
        kind: Any = self.pipeline
        if controlnet is not None:
            kind, parts["controlnet"] = self.control_pipeline, controlnet
        with quiet():
            pipeline = kind(**parts, **self.parts())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def scheduler(self, process: Mapping[str, Any] = EMPTY) -> SchedulerMixin:
        """A new scheduler of the folder's class and config, changed by `process`.

        A class that does not take a change, as PNDM takes no rescale_betas_zero_snr, would ignore it, and
        some cannot step a predicted sample; then it is DDIM, which takes them all.
        """
        library, name = self.facts.components["scheduler"]
        kind: Any = getattr(diffusers, name, None) if library == "diffusers" else None
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            found = (
                f"its scheduler is {library}.{name}, which this diffusers lacks or needs another package for"
            )
            raise UserError(
                f"the pipeline of {self.folder}", found, "name one of diffusers' in model_index.json"
            )
        settings = {**self.scheduler_config, **process}
        stuck = settings.get("prediction_type") == "sample" and name.removesuffix("Scheduler") in NO_SAMPLES
        if stuck or not process.keys() <= inspect.signature(kind).parameters.keys():
            # DDIM would clip latents as if they were pixels.
            kind, settings = DDIMScheduler, {**settings, "clip_sample": False}
        return kind.from_config(settings)
