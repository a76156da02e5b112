"""What learns, and in which module. A method is one file: see `Method` for what it must say."""

from sfumato.config import Config
from sfumato.methods.controlnet import ControlNet
from sfumato.methods.full import Full
from sfumato.methods.lora import LoRA
from sfumato.methods.method import Method, Trained
from sfumato.methods.textual_inversion import TextualInversion
from sfumato.models.family import Family

__all__ = ["METHODS", "Method", "Trained", "build"]

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "lora": LoRA,
    "controlnet": ControlNet,
    "textual_inversion": TextualInversion,
}


def build(config: Config, family: Family) -> Method:
    """The method that `method.kind` names."""
    return METHODS[config.method.kind](family, config)
