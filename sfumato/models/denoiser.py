"""How a part that is trained computes: its attention kernel, and what its backward pass keeps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sfumato.config import FASTEST, Checkpointing
from sfumato.models.attention import Kernels, set_attention
from sfumato.models.signatures import remember
from sfumato.models.unscaled import unscale

DEAR = [
    operator.default
    for name in (
        *("mm", "addmm", "convolution", "_scaled_dot_product_flash_attention"),
        *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention"),
        *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable"),
    )
    if (operator := getattr(torch.ops.aten, name, None)) is not None
]
"""What "selective" keeps the answers of. Not bmm: plain attention's scores are far larger than its answer."""


def prepare(net: nn.Module, attention: Kernels | None, checkpointing: Checkpointing) -> None:
    """Choose a part's attention kernel, and which activations it computes again in the backward pass.

    Text encoders keep their own kernel, and where nothing was timed "fastest" is torch's own choice. Raises
    UserError for an attention backend that diffusers does not know or cannot use here.
    """
    model: Any = net
    if not isinstance(net, diffusers.ModelMixin):
        if checkpointing:
            model.gradient_checkpointing_enable(options(checkpointing))
        return
    unscale(net)
    if attention is not None and attention != FASTEST:
        set_attention(net, attention)
    remember(net)
    if checkpointing:
        model.enable_gradient_checkpointing(partial(recomputed, checkpointing=checkpointing))


def recomputed(module: Callable[..., Any], *inputs: Any, checkpointing: Checkpointing = True) -> Any:
    """A call whose activations are computed again in the backward pass."""
    return checkpoint(module, *inputs, **options(checkpointing))


def options(checkpointing: Checkpointing) -> dict[str, Any]:
    """How torch's checkpoint is called.

    Not re-entrant: the re-entrant kind loses gradients of layers whose input has none, and ZeRO 2 and 3
    refuse it for a module that is used twice.
    """
    found: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "selective":
        found["context_fn"] = partial(create_selective_checkpoint_contexts, DEAR)
    return found
