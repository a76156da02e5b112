"""Keys and values of a text: computed at a picture's first denoising step, and taken again at the others."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sfumato.models.compiled import draws_compiled


@contextmanager
def remembering(parts: Iterable[Any]) -> Iterator[None]:
    """Within it keys and values of one and the same text are computed once by each layer, to the bit.

    parts: of a pipeline; what is no U-Net or ControlNet is left alone, and so is what is compiled for
    drawing, which takes a text through its own code. Weights may not change within.
    """
    changed: list[Any] = []
    for part in parts:
        if not isinstance(part, nn.Module) or draws_compiled(part):
            continue
        for block in part.modules():
            if isinstance(block, Attention) and block.is_cross_attention:
                changed += [block.to_k, block.to_v]
    before = [vars(layer).get("forward") for layer in changed]
    for layer in changed:
        layer.forward = remembered(layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(changed, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def remembered(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function of a tensor, which answers at once where it was asked the same tensor before."""
    kept: list[Any] = [None, 0, None]  # the tensor, how often it had been written to, and the answer

    def answer(text: Tensor, *more: Any, **options: Any) -> Tensor:
        if torch.is_grad_enabled() or more or options:
            return forward(text, *more, **options)
        if kept[0] is not text or kept[1] != text._version:
            kept[:] = text, text._version, forward(text)
        found: Tensor = kept[2]
        return found

    return answer
