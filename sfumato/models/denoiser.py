"""How a part that is trained computes: its attention kernel, and what its backward pass keeps."""

from collections.abc import Callable
from typing import Any

import diffusers
from torch import nn
from torch.utils.checkpoint import checkpoint

from sfumato.models.attention import set_attention


def prepare(net: nn.Module, attention: str | None, checkpointing: bool) -> None:
    """Choose a part's attention kernel, and whether it recomputes activations in the backward pass.

    Text encoders keep their own kernel. Raises UserError for an attention backend that diffusers does not
    know or cannot use here.
    """
    model: Any = net
    if not isinstance(net, diffusers.ModelMixin):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return
    if attention is not None:
        set_attention(net, attention)
    if checkpointing:
        model.enable_gradient_checkpointing(recomputed)


def recomputed(module: Callable[..., Any], *inputs: Any) -> Any:
    """A call whose activations are computed again in the backward pass.

    Not re-entrant: the re-entrant kind loses gradients of layers whose input has none, and ZeRO 2 and 3
    refuse it for a module that is used twice.
    """
    return checkpoint(module, *inputs, use_reentrant=False)
