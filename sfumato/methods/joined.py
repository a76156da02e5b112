"""A linear layer's adapter whose second matrix, scale and sum are one operator.

peft asks for three, and for one more backward. What they write and read between is as large as the layer's
answer. Stage 3 of ZeRO brings a matrix only to the module that holds it, so there peft's own way stays.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def join(net: nn.Module, name: str) -> int:
    """Have a model's linear layers with a plain adapter of this name compute so; how many there are."""
    kind, joined, found = *kinds(), 0
    layers: Iterable[Any] = net.modules()
    for layer in layers:
        if type(layer) is kind and name not in layer.lora_variant and layer.lora_B[name].bias is None:
            layer.__class__, layer.joined = joined, name
            found += 1
    return found


@cache
def kinds() -> tuple[Any, Any]:
    """peft's linear layer, and ours."""
    from peft.tuners.lora import Linear

    class Joined(Linear):
        """peft's layer, asked for its one adapter; whatever else is asked of it, it does as ever."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name = self.joined
            if args or kwargs or self.disable_adapters or self.merged or self.active_adapters != [name]:
                return super().forward(x, *args, **kwargs)
            base = self.base_layer(x)  # (..., out)
            first, second = self.lora_A[name], self.lora_B[name]
            low = first(self.lora_dropout[name](self._cast_input_dtype(x, first.weight.dtype)))  # (..., rank)
            if low.dtype != base.dtype:
                return (base + second(low) * self.scaling[name]).to(base.dtype)
            rows = base.reshape(-1, base.shape[-1]), low.reshape(-1, low.shape[-1])
            return torch.addmm(*rows, second.weight.t(), alpha=self.scaling[name]).view(base.shape)

    return Linear, Joined
