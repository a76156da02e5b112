"""ControlNet: a copy of the denoiser's first half learns to steer it by a second image (arXiv:2302.05543)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor

from sfumato import config, models
from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.methods.method import Method, Trained
from sfumato.models import control
from sfumato.models.control import PART
from sfumato.models.family import Family
from sfumato.models.folder import Facts
from sfumato.models.loading import module_dtype, quiet
from sfumato.models.parts import Parts
from sfumato.models.texts import Condition

OWN = f"{PART}.controlnet_"
"""What the names of layers begin with that the denoiser does not have."""
EMBEDDING = f"{OWN}cond_embedding."
"""The small net that reads the second image."""
EMBEDDED = (16, 32, 96, 256)
"""Its channels at full size and after each halving, as diffusers has them for a VAE of 8 pixels a latent."""


class ControlNet(Method):
    """A ControlNet beside the denoiser; it alone learns.

    The condition holds "hint" besides: the second images (B, 3, H, W) in [0, 1].
    """

    def __init__(self, family: Family, config: config.Config) -> None:
        """Raises UserError if no ControlNet goes with the denoiser, or method.weights is none that does."""
        super().__init__(family, config)
        assert config.method.kind == "controlnet", f"a run of {config.method.kind}"
        self.start = source(config.method.weights)
        self.shape = blank(family.facts, self.start)

    @classmethod
    def check(cls, config: config.Config, facts: Facts, captions: Iterable[str]) -> int:
        assert config.method.kind == "controlnet", f"a run of {config.method.kind}"
        return sum(p.numel() for p in blank(facts, source(config.method.weights)).parameters())

    def build(self) -> Parts:
        """The frozen denoiser and the ControlNet from their configs."""
        base = self.family.build_denoiser().requires_grad_(False)
        with quiet():
            net = ControlNetModel.from_config(self.shape.config)
        return self.assembled(**{self.family.learns: base, PART: net})

    def weights(self) -> Mapping[str, Sequence[Path]]:
        """The denoiser's files, and those of a ControlNet to go on from."""
        base = super().weights()
        return base if self.start is None else {**base, PART: control.weights_in(self.start)}

    def source_name(self, name: str) -> str:
        """What a new ControlNet shares with the denoiser starts as a copy of it."""
        if self.start is None and name.startswith(f"{PART}.") and not name.startswith(OWN):
            return self.family.learns + name.removeprefix(PART)
        return name

    def draw(self, seed: int) -> dict[str, Tensor]:
        """What a new ControlNet does not share: convolutions of zeros, and the embedding of second images.

        The embedding is drawn as diffusers draws it, and its last layer is zeros too.
        """
        if self.start is not None:
            return {}
        shape = self.shape
        drawn = {f"{PART}.{name}": tuple(p.shape) for name, p in shape.named_parameters()}
        found = {name: torch.zeros(size) for name, size in drawn.items() if name.startswith(OWN)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            embedding = ControlNetConditioningEmbedding(
                conditioning_embedding_channels=shape.config.block_out_channels[0],
                block_out_channels=shape.config.conditioning_embedding_out_channels,
                conditioning_channels=shape.config.conditioning_channels,
            )
        return found | {f"{EMBEDDING}{name}": p.detach() for name, p in embedding.named_parameters()}

    def encode(self, batch: Batch) -> tuple[Tensor, Condition]:
        """As every method, and the second images."""
        assert batch.hint is not None, "a batch without second images"
        latents, condition = super().encode(batch)
        return latents, condition | {"hint": batch.hint.to(self.family.device)}

    def predict(self, parts: Parts, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's answer, with what the ControlNet adds to its skip connections and its middle."""
        base = parts[self.family.learns]
        dtype = module_dtype(base)
        told = self.family.inputs(dtype, x_t, t, condition)
        hint = condition["hint"].to(dtype)
        down, mid = parts[PART](**told, controlnet_cond=hint, return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return base(**told, **added, return_dict=False)[0]

    def pipeline(self, parts: Parts, process: Mapping[str, Any]) -> tuple[Any, Family]:
        """The family's pipeline that draws with a ControlNet."""
        return self.family.assemble(parts[self.family.learns], process, parts[PART]), self.family

    def export(self, trained: Trained, folder: Path, dtype: torch.dtype, process: Mapping[str, Any]) -> None:
        """A folder for ControlNetModel.from_pretrained."""
        with torch.device("meta"), quiet():
            net = ControlNetModel.from_config(self.shape.config)
        net.load_state_dict(
            {name.removeprefix(f"{PART}."): numbers.to(dtype) for name, numbers in trained.items()},
            assign=True,
        )
        with quiet():
            net.save_pretrained(folder, safe_serialization=True)


def source(weights: str | None) -> Path | None:
    """The folder of the ControlNet that method.weights means, if it is set. Raises UserError."""
    return None if weights is None else control.find(weights, f"the ControlNet {weights} (method.weights)")


def blank(facts: Facts, start: Path | None) -> Any:
    """The ControlNet that learns, without numbers: as `start` says, or as the denoiser asks for.

    Raises UserError if diffusers has none for such a denoiser, or `start` was made for another one.
    """
    asked = f"a ControlNet for {facts.folder}"
    if models.family_class(facts.family).control_pipeline is None:
        found = f"the family {facts.family} names no pipeline of diffusers that draws with one"
        raise UserError(asked, found, "choose weights of Stable Diffusion or SDXL, or another method")
    if start is not None:
        return given(facts, start)
    try:
        with torch.device("meta"), quiet():
            base = UNet2DConditionModel.from_config(facts.denoiser)
            # One stride of two for each halving of the VAE, whose latents the second image is brought to.
            widths = EMBEDDED[: facts.vae_factor.bit_length()]
            net = ControlNetModel.from_unet(
                base, conditioning_embedding_out_channels=widths, load_weights_from_unet=False
            )
    except (TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(asked, f"diffusers cannot make one: {reason}", "choose other weights") from error
    theirs = {name: tuple(p.shape) for name, p in base.named_parameters()}
    for name, p in net.named_parameters():
        if not f"{PART}.{name}".startswith(OWN) and theirs.get(name) != tuple(p.shape):
            found = f"{name} is {tuple(p.shape)} in diffusers' ControlNet, {theirs.get(name)} in the denoiser"
            raise UserError(asked, found, "choose other weights: no ControlNet is a copy of these")
    return net


def given(facts: Facts, start: Path) -> Any:
    """The ControlNet of a folder, without numbers. Raises UserError if it does not go with the denoiser."""
    said = control.check_pair(start, facts.folder, facts.denoiser)
    with torch.device("meta"), quiet():
        return ControlNetModel.from_config(said)
