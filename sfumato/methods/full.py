"""Every weight of the denoiser learns."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.config import Config
from sfumato.models.denoiser import prepare
from sfumato.models.family import Condition, Family
from sfumato.models.folder import weight_files
from sfumato.models.loading import quiet


class Full:
    """Full training: the denoiser itself is the trained module."""

    def __init__(self, family: Family, config: Config) -> None:
        self.family, self.config = family, config

    def build(self) -> nn.Module:
        """The denoiser from its config file, holding random numbers."""
        net = self.family.build_denoiser()
        prepare(net, self.config.engine.attention, self.config.engine.gradient_checkpointing)
        return net

    def weights(self) -> list[Path]:
        """The denoiser's safetensors; [] when training from scratch."""
        if self.family.model.from_scratch:
            return []
        return weight_files(self.family.folder, self.family.learns, self.family.model.variant)

    def draw(self, seed: int) -> dict[str, Tensor]:
        """The whole denoiser's random weights when training from scratch, else nothing."""
        if not self.family.model.from_scratch:
            return {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = self.build()
        return {name: p.detach().contiguous() for name, p in net.state_dict().items()}

    def source_name(self, name: str) -> str:
        """Parameters have the names that they have in the files."""
        return name

    def export(
        self,
        read: Callable[[str], Tensor],
        folder: Path,
        dtype: torch.dtype,
        process: Mapping[str, Any],
    ) -> None:
        """A whole diffusers pipeline."""
        net: Any = self.family.build_denoiser()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(read(name))
        vae = self.family.vae
        if not (vae.config.force_upcast and dtype == torch.float16):
            # SDXL's VAE overflows in fp16 and says so in its config: it stays fp32.
            with quiet():
                vae.to(dtype)
        with quiet():
            pipeline = self.family.assemble(net.to(dtype).eval(), process)
            pipeline.save_pretrained(folder, safe_serialization=True)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's answer, (B, c, h, w)."""
        return self.family.predict(net, x_t, t, condition)
