"""What a processor of attention takes, looked up once.

diffusers' attention asks Python for the signature of its processor's call at every call: a tenth of a
millisecond of the host's time, 140 times in a forward pass of SDXL, which is much beside what a small batch
takes on a card. Python itself takes a signature that a function was given for its own.
"""

import inspect
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn


def remember(net: nn.Module) -> None:
    """Give the processors of a model's attention their signatures; nothing that is computed changes."""
    for module in net.modules():
        if isinstance(module, Attention):
            call: Any = type(module.processor).__call__
            if "__signature__" not in vars(call):
                call.__signature__ = inspect.signature(call)
