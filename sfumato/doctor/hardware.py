"""What this process computes on: memory, number formats, and what the maker's own tool says of its health."""

import shutil
import subprocess
from typing import Any

import torch

from sfumato.config import Config
from sfumato.device import accelerator, kind, memory, name_of
from sfumato.doctor.lines import Line, bad, good, judged, warning
from sfumato.tuning import has_bf16

QUERY = ("ecc.errors.uncorrected.volatile.total", "temperature.gpu", "clocks_throttle_reasons.active")
"""What nvidia-smi is asked of each GPU."""
HARMLESS = 0x1 | 0x2 | 0x4
"""Reasons of lower clocks that are no fault: idle, clocks that were asked for, the power limit."""
BUSY = 0.1
"""Share of a device's memory that others may hold before it is told."""


def lines(config: Config | None, device: torch.device) -> list[Line]:
    """What is said of the device and its health."""
    if kind() == "cpu":
        low = matmul_works(device)
        bf16 = ("works" if has_bf16() else "works, slower than fp32") if low else "fails"
        text = f"no accelerator: CPU ranks; bf16 {bf16}, fp16 is not for training here"
        return [judged(low, "device", text, "set engine.precision = fp32", grave=wants(config, "bf16"))]
    seam = accelerator()
    formats = {"bf16": bool(seam.is_bf16_supported()), "fp16": bool(seam.is_fp16_supported())}
    free, total = memory(device)
    capability = getattr(getattr(torch, device.type, None), "get_device_capability", None)
    told = [name_of(device), f"{free / 1e9:,.1f} of {total / 1e9:,.1f} GB free"]
    if capability is not None:
        told.append(f"compute capability {'.'.join(map(str, capability(device)))}")
    told += [f"{name} {'yes' if works else 'no'}" for name, works in formats.items()]
    text = ", ".join(told)
    lacking = [name for name, works in formats.items() if not works and wants(config, name)]
    figures: dict[str, Any] = {"total": total, "free": free, "formats": formats}
    if lacking:
        return [bad("device", text, f"set another engine.precision than {lacking[0]}", **figures)]
    found = [judged(free >= (1 - BUSY) * total, "device", text, "end what else holds its memory", **figures)]
    return found + health()


def wants(config: Config | None, precision: str) -> bool:
    """Whether the config computes in it."""
    return config is not None and config.engine.precision == precision


def matmul_works(device: torch.device) -> bool:
    """Whether a product in bf16 is right to bf16's digits."""
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    got = (a.bfloat16() @ a.bfloat16()).float()
    return bool(torch.allclose(got, a @ a, atol=0.5, rtol=0.05))


def health() -> list[Line]:
    """Errors of memory and throttling, where the maker's tool tells them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [judged_health(done.stdout)]


def judged_health(said: str) -> Line:
    """What the tool's rows (errors, degrees, reasons of lower clocks) mean, a row a GPU."""
    errors, hot, reasons = {}, [], {}
    for number, row in enumerate(said.strip().splitlines()):
        count, degrees, active = (part.strip() for part in row.split(","))
        hot.append(degrees)
        if count.isdigit() and int(count):
            errors[number] = int(count)
        if active.startswith("0x") and int(active, 16) & ~HARMLESS:
            reasons[number] = active
    text = f"{', '.join(hot)} degrees"
    if errors:
        told = ", ".join(f"GPU {number}: {count}" for number, count in errors.items())
        do = "leave that GPU out, and have it tested: its memory gives wrong numbers"
        return bad("health", f"uncorrected memory errors, {told}; {text}", do, errors=errors)
    if reasons:
        told = ", ".join(f"GPU {number} ({active})" for number, active in reasons.items())
        do = "see `nvidia-smi -q -d PERFORMANCE`: cooling or power"
        return warning("health", f"slowed down: {told}; {text}", do, reasons=reasons)
    return good("health", f"no uncorrected memory errors, not slowed down; {text}")
