"""Every weight of the denoiser learns."""

from pathlib import Path

from torch import Tensor, nn

from sfumato import config
from sfumato.models.family import Condition, Family, prepare
from sfumato.models.folder import weight_files


class Full:
    """Full training: the denoiser itself is the trained module."""

    def __init__(self, family: Family, engine: config.Engine) -> None:
        self.family, self.engine = family, engine

    def build(self) -> nn.Module:
        """The denoiser from its config file, holding random numbers."""
        net = self.family.build_denoiser()
        prepare(net, self.engine.attention, self.engine.gradient_checkpointing)
        return net

    def weights(self) -> list[Path]:
        """The denoiser's safetensors; [] when training from scratch."""
        if self.family.model.from_scratch:
            return []
        return weight_files(self.family.folder, self.family.learns, self.family.model.variant)

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's answer, (B, c, h, w)."""
        return self.family.predict(net, x_t, t, condition)
