"""What learns, and in which module. A method is one file: see `Method` for what it must say."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from sfumato.config import Config
from sfumato.methods.full import Full
from sfumato.models.family import Condition, Family


class Method(Protocol):
    """What the loop asks of a method."""

    def build(self) -> nn.Module:
        """The module that the engine wraps; what requires gradients learns. Its numbers are not used."""

    def weights(self) -> list[Path]:
        """The safetensors that the module starts from; [] to start from random numbers."""

    def predict(self, net: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The answer (B, c, h, w) to x_t (B, c, h, w) at timesteps t (B,); `net` is the wrapped module."""


METHODS: dict[str, type[Full]] = {"full": Full}


def build(config: Config, family: Family) -> Method:
    """The method that `method.kind` names."""
    return METHODS[config.method.kind](family, config.engine)
