"""The kernels that an accelerator would choose, for tensors that have no numbers and no device.

On the meta device torch computes attention as a matrix, which a GPU does not, and knows no autocast. Within
`Kernels` both are as on CUDA: what autograd saves of a step is what it saves there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOWERED: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.scaled_dot_product_attention),
        *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
    }
)
"""What autocast computes in the lower precision, of what models call."""
RAISED: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm, F.softmax, torch.softmax),
        *(Tensor.softmax, F.mse_loss, torch.exp, Tensor.exp, torch.sum, Tensor.sum, torch.pow, Tensor.pow),
        *(torch.norm, Tensor.norm, torch.cumsum, Tensor.cumsum, torch.prod, Tensor.prod),
    }
)
"""What CUDA's autocast computes in fp32."""
HALF = (torch.bfloat16, torch.float16)
FLASH_WIDTH = 256
"""The widest head of flash attention; wider ones, as a VAE's, take the memory-efficient kernel."""


class Kernels(TorchFunctionMode):
    """Within it attention keeps queries, keys, values, the answer and a number a row, and no matrix.

    lower: what `autocast` casts to; None: it does nothing. raised: the functions that it computes in fp32.
    Questions about numbers, which nothing on the meta device has, are answered with no: nothing is
    not finite, and no caption is dropped.
    """

    def __init__(self, lower: torch.dtype | None = None, raised: frozenset[Any] = RAISED) -> None:
        super().__init__()
        self.lower, self.raised = lower, raised
        self.casting = False
        self._casts: dict[int, Tensor] | None = None

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Casts as torch.autocast does, each weight once; afterwards what is recomputed casts anew."""
        self.casting, self._casts = self.lower is not None, {}
        try:
            yield
        finally:
            self._casts = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.casting and func in LOWERED:
            args, kwargs = cast(self.lowered, args), cast(self.lowered, kwargs)
        elif self.casting and func in self.raised:
            args, kwargs = cast(raised, args), cast(raised, kwargs)
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func in (torch.nonzero, Tensor.nonzero):
            return args[0].new_empty((0, args[0].ndim), dtype=torch.long)
        if func is Tensor.__bool__ and args[0].device.type == "meta":
            return False
        return func(*args, **kwargs)

    def lowered(self, tensor: Tensor) -> Tensor:
        """A tensor in the lower precision; a weight that learns is cast once in a forward pass."""
        if tensor.dtype not in (torch.float32, *HALF) or tensor.dtype == self.lower:
            return tensor
        if self._casts is None or not (tensor.requires_grad and tensor.is_leaf):
            return tensor.to(self.lower)
        if id(tensor) not in self._casts:
            self._casts[id(tensor)] = tensor.to(self.lower)
        return self._casts[id(tensor)]


def cast(how: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A function's arguments with their tensors cast."""
    if isinstance(value, Tensor):
        return how(value)
    if isinstance(value, (list, tuple)):
        return [*(cast(how, part) for part in value)]
    return {name: cast(how, part) for name, part in value.items()} if isinstance(value, dict) else value


def raised(tensor: Tensor) -> Tensor:
    """A tensor of half precision in fp32."""
    return tensor.float() if tensor.dtype in HALF else tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention (B, heads, n, d) by the kernel that CUDA takes.

    That is flash attention in half precision without a mask, and the memory-efficient one else.
    """
    assert not enable_gqa, "no model here shares keys among heads"
    if attn_mask is None and query.dtype in HALF and query.shape[-1] <= FLASH_WIDTH:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        answer: Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return answer
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    learns = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    answer = efficient(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]
    return answer
