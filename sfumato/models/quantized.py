"""Frozen layers in 8 or 4 bits, for adapters over a base that takes less memory. Needs bitsandbytes."""

from typing import Any

import torch
from torch import nn

from sfumato.errors import UserError

BLOCK = 64
"""Weights that share a scale; a layer whose rows are no multiple of it stays as it is."""
OUTLIER = 6.0
"""Inputs beyond this are multiplied by the layer's columns in 16 bits (LLM.int8, arXiv:2208.07339)."""


def library(asked: str) -> Any:
    """The package bitsandbytes. Raises UserError, with the pip line, if it cannot be imported."""
    try:
        import bitsandbytes
    except ImportError as error:
        found = f"the package bitsandbytes holds weights in few bits, and cannot be imported: {error}"
        raise UserError(asked, found, "pip install 'sfumato[bits]'") from error
    return bitsandbytes


@torch.no_grad()
def quantize(net: nn.Module, bits: int) -> None:
    """Put a layer of few bits into the place of each linear layer that is frozen; convolutions stay.

    4: NF4, which spaces its 16 values as a Gaussian's quantiles (QLoRA, arXiv:2305.14314). 8: LLM.int8.
    Either computes in the dtype that the weights had.
    """
    kinds = library(f"weights in {bits} bits").nn
    for name, layer in [*net.named_modules()]:
        if type(layer) is not nn.Linear or any(p.requires_grad for p in layer.parameters()):
            continue
        if layer.in_features % BLOCK:
            continue
        shape, weight = (layer.in_features, layer.out_features), layer.weight.detach()
        options: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta"}
        if bits == 4:
            new = kinds.Linear4bit(*shape, compute_dtype=weight.dtype, quant_type="nf4", **options)
            new.weight = kinds.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            new = kinds.Linear8bitLt(*shape, has_fp16_weights=False, threshold=OUTLIER, **options)
            new.weight = kinds.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        # bitsandbytes packs the numbers when a layer comes to its device.
        new.train(layer.training).to(weight.device)
        net.set_submodule(name, new)
