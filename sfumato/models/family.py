"""The contract of a family of models, and what families share.

A family is one file of this folder that ends in `FAMILY = ...`. Shapes: B samples, H x W pixels, c latent
channels of h x w.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from sfumato import config
from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.models.attention import probe
from sfumato.models.folder import examine, read_json
from sfumato.models.identity import fingerprint
from sfumato.models.loading import frozen, quiet

Condition = dict[str, Tensor]
EMPTY: Mapping[str, Any] = MappingProxyType({})


class Family:
    """The frozen parts of a model, how they encode, and how its denoiser is asked.

    `folder`: the weights as `folder.locate` found them. `dtype`: arithmetic of the text encoders.
    Raises UserError for every fault of the folder, those of the frozen parts' files when they are loaded.
    """

    pipeline: ClassVar[type[DiffusionPipeline]]
    """What is loaded, drawn with and exported."""
    needs: ClassVar[tuple[str, ...]]
    """The folders that the family reads besides the denoiser's, the VAE's and the scheduler's."""
    denoiser_class: ClassVar[type[nn.Module]]
    learns: ClassVar[str] = "unet"
    """The part that is trained, by its name in the folder."""
    encoders: ClassVar[tuple[str, ...]]
    """The family's cached properties that hold tokenizers and text encoders, loaded at their first use."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the layers that LoRA changes."""
    size_and_crop: ClassVar[bool] = False
    """Whether the condition holds the batch's size_and_crop."""

    def __init__(
        self,
        folder: Path,
        model: config.Model,
        device: torch.device,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
    ) -> None:
        self.facts = examine(model.model_copy(update={"weights": str(folder), "revision": None}))
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
        with quiet(), torch.device("meta"):
            return AutoencoderKL.from_config(read_json(self.facts.vae_folder / "config.json")).config

    def load(self, images: bool = True, captions: bool = True) -> "Family":
        """Load the parts that encode images or captions at once, so that their faults are told at once."""
        _ = images and self.vae
        _ = captions and self.parts()
        return self

    def release(self) -> None:
        """Let go of the frozen parts; they are loaded again when they are needed."""
        for name in ("vae", *self.encoders):
            self.__dict__.pop(name, None)

    def identity(self, images: bool) -> str:
        """Hash of all that the encoding of images, or else of captions, depends on besides its input."""
        if images:
            return fingerprint([self.facts.vae_folder], [self.vae_dtype])
        settings = sorted(self.facts.settings.items())
        said = [self.dtype, self.facts.family, self.model.prompt_window, settings]
        return fingerprint([self.folder / part for part in self.needs], said)

    # What a family must say.

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Prompts -> tensors of B rows, to the bit what the pipeline's encode_prompt gives. No gradients."""
        raise NotImplementedError

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's answer (B, c, h, w) to x_t (B, c, h, w) at timesteps t (B,), which stay fp32."""
        raise NotImplementedError

    def parts(self) -> dict[str, Any]:
        """The pipeline's arguments besides denoiser, VAE and scheduler."""
        raise NotImplementedError

    def prompt_inputs(self, condition: Condition, null: Condition) -> dict[str, Tensor]:
        """What the pipeline's call takes in place of prompt and negative prompt."""
        raise NotImplementedError

    @staticmethod
    def tiny(folder: Path, seed: int = 0) -> None:
        """Write the family's random toy twin as a diffusers folder."""
        raise NotImplementedError

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
        bad = (~torch.isfinite(found).flatten(1).all(1)).nonzero().flatten()  # (k,)
        if self.vae_dtype == torch.float32 or not len(bad):
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

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, Condition]:
        """A batch -> latents (B, c, h, w) fp32 and its condition, in which dropped samples have the null one.

        Raises UserError that names the samples whose latents are not finite.
        """
        moments = batch.moments
        if moments is None:
            assert batch.pixels is not None, "a batch without pixels or moments"
            moments = self.safe_moments(batch.pixels)
        latents = self.latents(moments.to(self.device), batch.draws.posterior)
        check_finite(latents, batch.ids, str(self.vae_dtype).removeprefix("torch."))
        return latents, self.condition(batch)

    @torch.no_grad()
    def condition(self, batch: Batch) -> Condition:
        """The batch's captions encoded, the null condition in the rows that are dropped."""
        if batch.text is not None:
            found = {name: rows.to(self.device) for name, rows in batch.text.items()}
        else:
            dropped = batch.dropped.to(self.device)
            null = self.null_condition()
            found = {
                name: torch.where(dropped.view(-1, *[1] * (rows.ndim - 1)), null[name], rows)
                for name, rows in self.encode_prompts(batch.captions).items()
            }
        if self.size_and_crop:
            found["size_and_crop"] = batch.size_and_crop.to(self.device)
        return found

    def null_condition(self) -> Condition:
        """What the pipeline uses where there is no negative prompt, B = 1. Made once."""
        return self._null

    @cached_property
    def _null(self) -> Condition:
        return self.make_null()

    def make_null(self) -> Condition:
        """The encoding of the empty prompt, unless the family's pipeline does something else."""
        return self.encode_prompts([""])

    # The denoiser and the pipeline around it.

    def build_denoiser(self) -> nn.Module:
        """The denoiser from its config file, holding random numbers of torch's global generator, in fp32."""
        with quiet():
            return self.denoiser_class.from_config(self.denoiser_config)  # type: ignore[attr-defined]

    def try_attention(self, backend: str, dtype: torch.dtype) -> None:
        """Run an attention backend once for every width of head; UserError if it cannot train here."""
        channels = self.denoiser_config["block_out_channels"]
        # diffusers gives the number of heads the name of their width (its issue 2011).
        heads = self.denoiser_config.get("num_attention_heads") or self.denoiser_config["attention_head_dim"]
        heads = [heads] * len(channels) if isinstance(heads, int) else heads
        for width in sorted({wide // count for wide, count in zip(channels, heads, strict=True)}):
            probe(backend, self.device, dtype, width)

    def assemble(self, denoiser: nn.Module, process: Mapping[str, Any] = EMPTY) -> DiffusionPipeline:
        """The family's pipeline around a denoiser; the frozen parts are shared with it, not copied.

        `process`: what training changed of the scheduler's config, such as prediction_type.
        """
        with quiet():
            parts = {self.learns: denoiser, "vae": self.vae, "scheduler": self.scheduler(process)}
            pipeline = self.pipeline(**parts, **self.parts())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def scheduler(self, process: Mapping[str, Any] = EMPTY) -> SchedulerMixin:
        """A new scheduler of the folder's class and config, changed by `process`.

        A class that does not take a change, as PNDM takes no rescale_betas_zero_snr, would ignore it; then it
        is DDIM, which takes them all.
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
        if not process.keys() <= inspect.signature(kind).parameters.keys():
            # DDIM would clip latents as if they were pixels.
            kind, settings = DDIMScheduler, {**settings, "clip_sample": False}
        return kind.from_config(settings)


def draw(moments: Tensor, posterior: Tensor) -> Tensor:
    """Mean and log-variance (B, 2c, h, w), unit noise (B, c, h, w) -> a sample of that Gaussian.

    Of a mean alone, (B, c, h, w), the sample is the mean.
    """
    if moments.shape[1] == posterior.shape[1]:
        return moments
    mean, logvar = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * posterior  # clamped as diffusers' Gaussian is


def check_width(folder: Path, what: str, gives: int, takes: Any) -> None:
    """Raise UserError unless the denoiser takes conditions as wide as the text encoders give them."""
    if any(width != gives for width in (takes if isinstance(takes, list) else [takes])):
        found = f"the denoiser takes a {what} of width {takes}, the text encoders give {gives}"
        raise UserError(
            f"the weights {folder}", found, "use a denoiser and text encoders that belong together"
        )


def check_finite(latents: Tensor, ids: Tensor, dtype: str) -> None:
    """Raise UserError that names the samples with latents that are not finite."""
    good = torch.isfinite(latents).flatten(1).all(1)  # (B,)
    if not bool(good.all()):
        bad = ids[~good.to(ids.device)].tolist()
        raise UserError(
            f"latents of the samples {', '.join(map(str, bad))}",
            f"the VAE, computing in {dtype}, gives numbers that are not finite",
            'look at these pictures; if they are sound, set model.vae_dtype = "fp32"',
        )
