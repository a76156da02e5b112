"""Which kernel computes attention in the denoiser.

diffusers' `set_attention_backend` reaches only classes that were rewritten for it. A UNet's are not, and
there the call changes nothing and says nothing; so a UNet gets a processor of ours that asks diffusers'
dispatcher.
"""

from collections.abc import Mapping

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.models import npu_masks
from sfumato.models.loading import quiet

NPU = "_native_npu"
Kernels = str | Mapping[str, str]
"""A backend for all layers, or for each kind of layer (`kind_of`); others have torch's own choice."""


class DispatchedAttention:
    """Attention of a UNet's transformer blocks through one of diffusers' backends."""

    def __init__(self, backend: str) -> None:
        self._attention_backend = AttentionBackendName(backend)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(B, n, d) attends to itself or to (B, m, c); returns (B, n, d).

        attention_mask: (B, 1 or n, m) or (B, 1 or heads, 1 or n, m), added to the scores or True where kept.
        """
        if attention_mask is not None and attention_mask.ndim == 3:
            attention_mask = attention_mask[:, None]
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (attn.heads, -1)
        query = attn.to_q(hidden_states).unflatten(-1, heads)  # (B, n, heads, d/heads)
        key = attn.to_k(context).unflatten(-1, heads)  # (B, m, heads, d/heads)
        value = attn.to_v(context).unflatten(-1, heads)
        mixed = dispatch_attention_fn(query, key, value, attention_mask, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](mixed.flatten(2).to(query.dtype)))


def kind_of(layer: str) -> str:
    """A layer of attention's name -> the kind whose layers compute one shape, as "down_blocks.1.attn2"."""
    parts = layer.split(".")
    return ".".join([*parts[: 1 if parts[0] == "mid_block" else 2], parts[-1]])


def layers_of(net: nn.Module) -> dict[str, Attention]:
    """A U-Net's or ControlNet's layers of attention, by their names."""
    return {name: module for name, module in net.named_modules() if isinstance(module, Attention)}


def backends(kernels: Kernels) -> list[str]:
    """The backends that are named."""
    return [kernels] if isinstance(kernels, str) else sorted(set(kernels.values()))


def check_here(kernels: Kernels) -> None:
    """Raise UserError for a backend that diffusers does not know or cannot use here; it lists what it can."""
    for backend in backends(kernels):
        if (reason := fault(backend)) is not None:
            usable = sorted(name for name in known() if fault(name) is None)
            do = f"choose one that works here: {', '.join(usable)}"
            raise UserError(f'engine.attention = "{backend}"', reason, do)


def set_attention(net: nn.Module, kernels: Kernels) -> None:
    """Let a diffusers model compute attention with the named backends.

    Raises UserError for one that diffusers cannot use here.
    """
    check_here(kernels)
    if NPU in backends(kernels):
        npu_masks.mend()
    layers = layers_of(net)
    for name, layer in layers.items():
        assert type(layer.processor) in (AttnProcessor2_0, DispatchedAttention) and plain(layer), (
            f"{type(net).__name__} has attention of a kind that is not rewritten: {layer.processor}"
        )
        chosen = kernels if isinstance(kernels, str) else kernels.get(kind_of(name))
        if chosen is not None:
            layer.set_processor(DispatchedAttention(chosen))
    if not layers and isinstance(kernels, str):
        with quiet():
            net.set_attention_backend(kernels)  # type: ignore[operator]


def try_kernels(kernels: Kernels, net: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Run each backend once for every width of head that it is for; UserError if it cannot train here.

    Raises UserError, too, for kinds of layers that the model does not have.
    """
    check_here(kernels)
    layers = layers_of(net)
    kinds = {kind_of(name) for name in layers}
    if not isinstance(kernels, str) and (unknown := sorted(set(kernels) - kinds)):
        do = f"its kinds are {', '.join(sorted(kinds))}"
        raise UserError(f"engine.attention for {', '.join(unknown)}", "the model has no such layers", do)
    wanted = {
        (kernels if isinstance(kernels, str) else kernels.get(kind_of(name)), layer.inner_dim // layer.heads)
        for name, layer in layers.items()
    }
    for backend, width in sorted((backend, width) for backend, width in wanted if backend is not None):
        probe(backend, device, dtype, width)


def known() -> list[str]:
    """The names of diffusers' backends."""
    return [member.value for member in AttentionBackendName]


def plain(layer: Attention) -> bool:
    """Whether a layer has none of the extras that `DispatchedAttention` leaves out."""
    extras = (layer.group_norm, layer.spatial_norm, layer.norm_q, layer.norm_k, layer.norm_cross)
    return not any(extras) and not layer.residual_connection and layer.rescale_output_factor == 1


def fault(backend: str) -> str | None:
    """Why diffusers cannot use a backend on this machine; None if it can."""
    if backend not in known():
        return "diffusers knows no such attention backend"
    try:
        _check_attention_backend_requirements(AttentionBackendName(backend))
    except RuntimeError as error:
        return str(error)
    return None


def probe(backend: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Raise UserError unless a backend gives native attention's answer and gradients for heads of this width.

    Some kernels have no backward pass: training with them would leave queries, keys and values as they are,
    without a word. Ascend's is tried with a mask as well, for it means the opposite of all others'.
    """
    mask = None
    if backend == NPU:
        npu_masks.mend()
        mask = (torch.arange(64) % 3 > 0).to(device).expand(2, 1, 64, 64)  # a third of the keys is left out
    for given in [None] if mask is None else [None, mask]:
        compare(backend, device, dtype, width, given)


def compare(backend: str, device: torch.device, dtype: torch.dtype, width: int, mask: Tensor | None) -> None:
    """`probe` with one mask, (2, 1, 64, 64) or None."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 64, 2, width)
    start = [
        torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)
    ]  # (B, n, heads, width)
    answers = []
    for name in ("native", backend):
        parts = [part.clone().requires_grad_() for part in start]
        try:
            mixed = dispatch_attention_fn(*parts, mask, backend=AttentionBackendName(name))
            (mixed.float() * start[0].float()).sum().backward()
        except Exception as error:  # packages fail in any way
            found = f"it does not run on {device.type} in {dtype}: {str(error).strip().split(chr(10))[0]}"
            raise UserError(f'engine.attention = "{backend}"', found, "choose another backend") from error
        answers.append([mixed, *(part.grad for part in parts)])
    for what, right, got in zip(("answer", "gradient", "gradient", "gradient"), *answers, strict=True):
        if got is None or not torch.allclose(got.float(), right.float(), rtol=0.05, atol=0.05):
            found = f"its {what} differs from native attention's: it is not made for training"
            raise UserError(f'engine.attention = "{backend}"', found, "choose another backend")
