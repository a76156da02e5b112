"""Every weight of the denoiser learns, and of the text encoders if they are to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.methods.method import Method, Trained
from sfumato.models.loading import quiet
from sfumato.models.parts import Parts


class Full(Method):
    """Full training."""

    def build(self) -> Parts:
        """The denoiser, and text encoders that learn, from their config files."""
        return self.assembled(**{self.family.learns: self.family.build_denoiser()}, **self.text_parts())

    def weights(self) -> Mapping[str, Sequence[Path]]:
        """The files of what learns, without the denoiser's when training from scratch."""
        return self.files_of(*self.text) if self.family.model.from_scratch else super().weights()

    def draw(self, seed: int) -> dict[str, Tensor]:
        """The whole denoiser's random weights when training from scratch, else nothing."""
        if not self.family.model.from_scratch:
            return {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = self.family.build_denoiser()
        return {f"{self.family.learns}.{name}": p.contiguous() for name, p in net.state_dict().items()}

    def export(self, trained: Trained, folder: Path, dtype: torch.dtype, process: Mapping[str, Any]) -> None:
        """A whole diffusers pipeline."""
        net: Any = self.family.build_denoiser()
        parts = {self.family.learns: net, **(self.family.text_encoders if self.text else {})}
        with torch.no_grad():
            for name, numbers in trained.items():
                part, _, inner = name.partition(".")
                parts[part].get_parameter(inner).copy_(numbers)
        vae = self.family.vae
        with quiet():
            if not (vae.config.force_upcast and dtype == torch.float16):
                # SDXL's VAE overflows in fp16 and says so in its config: it stays fp32.
                vae.to(dtype)
            self.family.assemble(net.to(dtype).eval(), process).save_pretrained(
                folder, safe_serialization=True
            )
