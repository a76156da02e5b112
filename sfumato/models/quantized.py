"""Frozen layers in 8 or 4 bits, for adapters over a base that takes less memory. Needs bitsandbytes."""

from typing import Any

import torch
from torch import Tensor, nn

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
    Either computes in the dtype that the weights had. On the meta device the layers are of the same sizes.
    """
    kinds = library(f"weights in {bits} bits").nn
    if any(p.device.type == "meta" for p in net.parameters()):
        kinds = None  # it packs nothing there
    for name, layer in [*net.named_modules()]:
        if type(layer) is not nn.Linear or any(p.requires_grad for p in layer.parameters()):
            continue
        if layer.in_features % BLOCK:
            continue
        if kinds is None:
            net.set_submodule(name, Sized(layer, bits))
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


class Sized(nn.Module):
    """A linear layer in few bits without numbers, of as many bytes as bitsandbytes' own."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        """layer: on the meta device, as it was before."""
        super().__init__()
        weight = layer.weight
        count, rows = weight.numel(), weight.shape[0]
        self.shape, self.dtype, self.bits, self.bias = weight.shape, weight.dtype, bits, layer.bias
        packed = count // 2 if bits == 4 else count
        # NF4's scales are in 8 bits themselves, and 256 of them share one; a table and a mean besides.
        scales = count // BLOCK + 4 * -(-count // (BLOCK * 256)) + 4 * (16 + 1) if bits == 4 else 4 * rows
        self.register_buffer("packed", weight.new_empty(packed, dtype=torch.uint8))
        self.register_buffer("scales", weight.new_empty(scales, dtype=torch.uint8))

    @property
    def weight(self) -> nn.Parameter:
        """The weights, unpacked anew: (outputs, inputs)."""
        packed: Any = self.packed
        return nn.Parameter(packed.new_empty(self.shape, dtype=self.dtype), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        answer: Tensor = _Product.apply(input.to(self.dtype), self)
        return answer.to(input.dtype)


class _Product(torch.autograd.Function):
    """Input times weights that are unpacked for it, and once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Sized) -> Tensor:
        ctx.layer = layer
        if layer.bits == 8:
            ctx.input = input  # LLM.int8 holds it, where no checkpoint can let go of it
        return nn.functional.linear(input, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight, None
