"""Masks for Ascend's fused attention, whose kernel leaves out what is True.

diffusers 0.42.1 turns every mask into booleans and inverts it: right for booleans that say what is kept, the
opposite for numbers that are added, 0 where a key is kept and very negative elsewhere (its issue 14397).
"""

import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from sfumato.errors import UserError

THEIRS = "_maybe_modify_attn_mask_npu"
NEVER = -9e3
"""A number that is added to a score and means: never. Who writes -10000 in bf16 gets -9984."""


def left_out(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """What the kernel takes: True where a key is left out, (B, 1 or heads, n, m); None where all are kept.

    query: (B, n, heads, d), key: (B, m, heads, d). mask: booleans, True where a key is kept, or numbers that
    are added to the scores; (B, m), or any shape that broadcasts to (B, heads, n, m), which goes first. A row
    that keeps no key gives what the kernel makes of it. Raises UserError for other numbers than 0 and never,
    which the kernel's mask cannot say. It waits for the device.
    """
    if mask is None:
        return None
    out = ~mask if mask.dtype == torch.bool else added(mask)
    if not bool(out.any()):
        return None
    batch, n, m = query.shape[0], query.shape[1], key.shape[1]
    if out.ndim == 2 and len(out) == batch and len(out) not in (1, n):
        out = out[:, None, None]
    while out.ndim < 4:
        out = out[None]
    return out.expand(batch, -1, n, m).contiguous()


def added(mask: Tensor) -> Tensor:
    """True where a mask of numbers leaves a key out."""
    never, kept = mask <= NEVER, mask == 0
    if not bool((never | kept).all()):
        raise UserError(
            'engine.attention = "_native_npu"',
            "a mask adds other numbers than 0 and very negative ones, which Ascend's kernel cannot",
            'set engine.attention = "native"',
        )
    return never


def mend() -> None:
    """Let diffusers' NPU backend take masks as every other backend does, in each model that passes one."""
    assert hasattr(attention_dispatch, THEIRS), "diffusers treats masks for NPUs elsewhere; see npu_masks.py"
    setattr(attention_dispatch, THEIRS, left_out)
