"""The fastest attention kernel for each kind of layer: all that can train here are timed at a run's sizes.

Which one is, depends on the device, the arithmetic and the shape: a layer that attends to 77 tokens of text
may want another one than the same block's attention to its own 4,096. All of them compute the same, up to
rounding; none that rounds on purpose (to 8 bits) is among them.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn

from sfumato.config import FASTEST, Config
from sfumato.device import accelerator, synchronize
from sfumato.errors import UserError
from sfumato.models import family_class
from sfumato.models.attention import fault, kind_of, layers_of, probe
from sfumato.models.folder import Facts
from sfumato.models.loading import DTYPES, quiet
from sfumato.models.prompts import TOKENS, windows

USUAL = "native"
"""torch's scaled_dot_product_attention, which is taken where no backend is named."""
PLAIN = "_native_math"
"""The one that holds a number for each query and key in memory."""
CANDIDATES = (
    *(USUAL, "_native_flash", "_native_cudnn", "_native_efficient", PLAIN),
    *("flash", "_flash_3", "xformers", "_native_npu"),
)
"""diffusers' names of what is tried, where its package is there; it fetches none."""
KEPT = CANDIDATES[:4]
"""Those whose answer "selective" checkpointing keeps (`DEAR` in denoiser.py decides); it would compute the
others' a second time."""
PLAIN_KEYS = 256
"""Keys up to which the plain one is tried, on CPUs alone: else it costs memory that nobody planned for."""
GAIN = 0.95
"""Share of the usual one's time below which another one is taken: less may be chance."""
TIMES, SECONDS = 5, 1.0
"""Passes of a kernel that are timed, and after how long no other begins."""


class Work(NamedTuple):
    """What a layer computes for a micro-batch."""

    batch: int
    queries: int
    keys: int
    heads: int
    width: int


class Found(NamedTuple):
    """The kernels that are faster than torch's own choice, by kind of layer, and what that is worth."""

    kernels: dict[str, str]
    usual: float
    """Seconds of the U-Net's layers, forward and backward, as torch chooses; the mean of the run's sizes."""
    chosen: float
    """The same with `kernels`."""

    def __str__(self) -> str:
        names = sorted({*self.kernels.values()})
        shares = [
            f"{name} for {sum(k == name for k in self.kernels.values())} kinds of layer" for name in names
        ]
        what = ", ".join(shares) or "torch's own choice"
        return f"attention: {what}; {self.chosen * 1e3:.3g} ms a micro-batch, torch's {self.usual * 1e3:.3g}"


def bare(facts: Facts) -> nn.Module:
    """The denoiser that a model's folder describes, without numbers."""
    kind: Any = family_class(facts.family).denoiser_class
    with quiet(), torch.device("meta"):
        net: nn.Module = kind.from_config(facts.denoiser)
    return net


def fastest(config: Config, facts: Facts, sizes: Sequence[tuple[int, int]], device: torch.device) -> Found:
    """Time all candidates for a run's denoiser and micro-batches.

    sizes: (height, width) of pictures; of many the smallest, the one in the middle and the largest are timed.
    """
    net, dtype = bare(facts), DTYPES[config.engine.precision]
    text = TOKENS * windows(config.model.prompt_window)
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    tried = sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})
    latents = [(high // facts.vae_factor, wide // facts.vae_factor) for high, wide in tried]
    works = [works_of(net, size, config.micro_batch_size, text) for size in latents]
    counts = {kind: sum(kind_of(name) == kind for name in layers_of(net)) for kind in works[0]}
    names = KEPT if config.engine.gradient_checkpointing == "selective" else CANDIDATES
    times = {work: times_of(work, names, device, dtype) for each in works for work in each.values()}
    accelerator().empty_cache()
    found, usual, chosen = {}, 0.0, 0.0
    for kind, count in counts.items():
        several = [times[each[kind]] for each in works]
        sums = {
            name: sum(one[name] for one in several) for name in CANDIDATES if all(name in o for o in several)
        }
        best = min(sums, key=lambda name: sums[name])
        if sums[best] < GAIN * sums[USUAL]:
            found[kind] = best
        usual += count * sums[USUAL] / len(tried)
        chosen += count * sums[found.get(kind, USUAL)] / len(tried)
    return Found(found, usual, chosen)


def works_of(net: nn.Module, size: tuple[int, int], batch: int, text: int) -> dict[str, Work]:
    """What each kind of layer of a U-Net computes for latents of a size; every level halves them, upwards."""
    levels = len(net.config.block_out_channels)  # type: ignore[union-attr, arg-type]
    found = {}
    for name, layer in layers_of(net).items():
        block, number, *_ = name.split(".")
        level = levels - 1
        if block != "mid_block":
            level = int(number) if block == "down_blocks" else level - int(number)
        high, wide = (-(-side // 2**level) for side in size)
        keys = text if layer.is_cross_attention else high * wide
        work = Work(batch, high * wide, keys, layer.heads, layer.inner_dim // layer.heads)
        found[kind_of(name)] = work
    return found


def times_of(work: Work, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of each of `names` that can train here, forward and backward.

    Raises UserError where torch's own choice cannot.
    """
    found = {}
    for name in names:
        if fault(name) is not None:
            continue
        if name == PLAIN and (device.type != "cpu" or work.keys > PLAIN_KEYS):
            continue
        try:
            if name != USUAL:
                probe(name, device, dtype, work.width)
            found[name] = timed(name, work, device, dtype)
        except Exception as error:  # of no use for training here, or too large; packages fail in any way
            if name == USUAL:
                said = (str(error).strip().splitlines() or [""])[0]
                found_ = f"torch's own attention fails for {work}: {type(error).__name__}: {said}"
                do = "lower micro_batch_size, or leave engine.attention unset"
                raise UserError(f'engine.attention = "{FASTEST}"', found_, do) from error
    return found


def timed(name: str, work: Work, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a forward and backward pass, the best of a few."""
    random = torch.Generator(device).manual_seed(0)  # not the run's

    def made(length: int) -> Tensor:
        shape = (work.batch, length, work.heads, work.width)
        return torch.randn(shape, device=device, dtype=dtype, generator=random)

    parts = [made(length).requires_grad_() for length in (work.queries, work.keys, work.keys)]
    gradient = made(work.queries)
    best, end = float("inf"), time.monotonic() + SECONDS
    for number in range(TIMES + 1):
        synchronize(device)
        began = time.perf_counter()
        dispatch_attention_fn(*parts, backend=AttentionBackendName(name)).backward(gradient)
        synchronize(device)
        if number:  # the first one makes ready
            best = min(best, time.perf_counter() - began)
        if number and time.monotonic() > end:
            break
    return best
