"""What a card can do at best: copies, matrix products, and attention by each kernel that works on it."""

import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from sfumato.device import synchronize
from sfumato.models.attention import fault
from sfumato.models.fastest import CANDIDATES

SHAPES = {"self 64x64": (10, 4096, 4096), "self 32x32": (20, 1024, 1024), "text 64x64": (10, 4096, 77)}
"""SDXL's attention at 1024 pixels: heads, queries, keys; a head is WIDTH wide."""
WIDTH, SAMPLES = 64, 4


def rate(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """How often a second something is done, over at least so many seconds; once before, for libraries."""
    work()
    synchronize(device)
    times, done, began = 1, 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        for _ in range(times):
            work()
        synchronize(device)
        done, times = done + times, min(2 * times, 64)
    return done / spent


def ceilings(device: torch.device, toy: bool) -> dict[str, Any]:
    """{"copy" (bytes read and written a second), "matmul" (bf16 FLOP/s), "attention" [{"shape", "backend",
    "forward", "both" (FLOP/s, null where it does not run), "fault"}]}."""
    seconds = 0.02 if toy else 1.0
    copied = copy(device, 2**16 if toy else 2**30, seconds)
    product = matmul(device, 128 if toy else 8192, 2 * seconds)
    return {"copy": copied, "matmul": product, "attention": attentions(device, toy, seconds / 5)}


def copy(device: torch.device, size: int, seconds: float) -> float:
    """Bytes read and written a second, of so many numbers of bf16."""
    numbers = torch.randn(size, device=device, dtype=torch.bfloat16)
    other = torch.empty_like(numbers)
    return 2 * numbers.nbytes * rate(lambda: other.copy_(numbers), device, seconds)


def matmul(device: torch.device, side: int, seconds: float) -> float:
    """FLOP/s of the product of two square matrices of bf16."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 * rate(lambda: left @ right, device, seconds)


def attentions(device: torch.device, toy: bool, seconds: float) -> list[dict[str, Any]]:
    """Every backend at every shape; one that fails says why."""
    found = []
    for name, (heads, queries, keys) in SHAPES.items():
        if toy:
            heads, queries, keys = 2, queries // 64, min(keys, 16)
        for backend in CANDIDATES:
            row: dict[str, Any] = {"shape": name, "backend": backend, "forward": None, "both": None}
            row["fault"] = fault(backend)
            if row["fault"] is None:
                try:
                    row |= attention(device, backend, heads, queries, keys, seconds)
                except Exception as error:  # a kernel may refuse a card in any way
                    row["fault"] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            found.append(row)
    return found


def attention(
    device: torch.device, backend: str, heads: int, queries: int, keys: int, seconds: float
) -> dict[str, float]:
    """FLOP/s of a kernel, forward and with its backward pass."""

    def made(length: int) -> Tensor:
        shape = (SAMPLES, length, heads, WIDTH)
        return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    parts = made(queries), made(keys), made(keys)
    kernel = AttentionBackendName(backend)
    flops = 4 * SAMPLES * heads * queries * keys * WIDTH

    def forward() -> Tensor:
        answer: Tensor = dispatch_attention_fn(*parts, backend=kernel)
        return answer

    def both() -> None:
        forward().sum().backward()

    with torch.no_grad():
        alone = flops * rate(forward, device, seconds)
    return {"forward": alone, "both": 3 * flops * rate(both, device, seconds)}


def share(flops: float | None, peak: float | None) -> float | None:
    """MFU; None where either is not known."""
    return None if flops is None or not peak else flops / peak
