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

    def frame(self, folder: Path, dtype: torch.dtype, process: Mapping[str, Any]) -> None:
        """A diffusers pipeline without the parts that learn."""
        family = self.family.with_text({part: self.blank(part) for part in self.text})
        vae = family.vae
        pipeline: Any = family.assemble(self.blank(family.learns), process)
        with quiet():
            if not (vae.config.force_upcast and dtype == torch.float16):
                # SDXL's VAE overflows in fp16 and says so in its config: it stays fp32.
                vae.to(dtype)
            pipeline.save_config(folder)
            for name, part in pipeline.components.items():
                if part is not None and name not in (family.learns, *self.text):
                    part.save_pretrained(folder / name)

    def export(self, trained: Trained, folder: Path, dtype: torch.dtype, process: Mapping[str, Any]) -> None:
        """The parts that learn, into the pipeline."""
        for part in (self.family.learns, *self.text):
            net = self.blank(part)
            names = ((inner, f"{part}.{inner}") for inner in net.state_dict())
            # What a text encoder's answer ignores did not learn.
            numbers = {
                inner: (trained[name] if name in trained else self.base_weight(name)).to(dtype)
                for inner, name in names
            }
            net.load_state_dict(numbers, assign=True)
            with quiet():
                net.eval().save_pretrained(folder / part)

    def blank(self, part: str) -> Any:
        """A part that learns, without numbers."""
        with torch.device("meta"):
            return self.family.build_text(part) if part in self.text else self.family.build_denoiser()
