"""What learns, and in which module. A method is one file: see `Method` for what it must say."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.config import Config
from sfumato.methods.full import Full
from sfumato.methods.lora import LoRA
from sfumato.models.family import Condition, Family

Read = Callable[[str], Tensor]


class Method(Protocol):
    """What the loop asks of a method."""

    def build(self) -> nn.Module:
        """The module that the engine wraps; what requires gradients learns. Its numbers are not used."""

    def weights(self) -> list[Path]:
        """The safetensors that the module starts from; [] if all of it is drawn."""

    def draw(self, seed: int) -> dict[str, Tensor]:
        """What no file holds: parameters by name, on the CPU, drawn from the seed. Called on one rank."""

    def source_name(self, name: str) -> str:
        """A parameter's name in the files."""

    def export(self, read: Read, folder: Path, dtype: torch.dtype, process: Mapping[str, Any]) -> None:
        """Write what was trained into a new folder, as its users load it.

        read: a trained parameter's name -> its fp32 numbers. process: see Family.scheduler.
        """

    def predict(self, net: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The answer (B, c, h, w) to x_t (B, c, h, w) at timesteps t (B,); `net` is the wrapped module."""


METHODS: dict[str, Callable[[Family, Config], Method]] = {"full": Full, "lora": LoRA}


def build(config: Config, family: Family) -> Method:
    """The method that `method.kind` names."""
    return METHODS[config.method.kind](family, config)
