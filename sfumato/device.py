"""What this process computes on, as DeepSpeed's accelerator tells it: CUDA, ROCm, Ascend, XPU or the CPU.

The one file that may name kinds of devices other than the CPU; all others ask it, or get_accelerator().
DeepSpeed takes seconds to import, so it is imported when the first question comes.
"""

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sfumato.errors import UserError

if TYPE_CHECKING:
    import torch

FUSED = ("cpu", "cuda", "xpu", "mps")
"""Kinds of devices for which torch itself has AdamW in one pass over memory. ROCm calls itself cuda."""

COMPILERS = {"cpu": None, "cuda": "triton"}
"""Kinds of devices for which torch.compile makes code, and the package that it needs for that."""


def telling(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's log tells a user something: that it takes the CPU does not."""
    return "Setting accelerator to CPU" not in str(record.msg)


def not_there(error: Exception) -> UserError | None:
    """What a user is told where DeepSpeed does not take the device that he named; None for other errors."""
    name, trace = os.environ.get("DS_ACCELERATOR"), traceback.extract_tb(error.__traceback__)
    if not name or not trace or not trace[-1].filename.endswith("real_accelerator.py"):
        return None
    do = "install what that kind of device needs, name another one, or unset it: then one is found"
    return UserError(f"DS_ACCELERATOR = {name}", str(error), do)


def accelerator() -> Any:
    """DeepSpeed's accelerator: the one seam to any device."""
    logging.getLogger("DeepSpeed").addFilter(telling)  # once: the same filter is not added again
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def kind() -> str:
    """DeepSpeed's name for it: "cpu", "cuda" (ROCm too), "npu" or "xpu"."""
    return str(accelerator().device_name())


def settle() -> None:
    """What a device's library must be told before anything lies on the device."""
    import torch

    settings = getattr(getattr(torch, "npu", None), "config", None)
    if kind() == "npu" and settings is not None:
        # Its own layouts are not those of the flat tensors that ZeRO cuts weights from; as MindSpeed-MM.
        settings.allow_internal_format = False


@contextmanager
def whole_fp32() -> Iterator[None]:
    """Within it convolutions in fp32 are fp32 on NVIDIA's devices, too, in the whole process.

    By itself torch lets their matrix units round what goes in to TF32's 10 bits.
    """
    from torch.backends import cudnn

    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def has_fused_adamw(device: "torch.device") -> bool:
    """Whether torch's AdamW has its one-pass kernel there."""
    return device.type in FUSED


def seed(device: "torch.device", number: int) -> None:
    """Set torch's generators, on the CPU and on the device.

    torch.manual_seed does the same for every kind of device that torch knows; for one that is not there it
    notes where it was called, which takes milliseconds.
    """
    import torch

    if device.type == "cpu":
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)


def synchronize(device: "torch.device") -> None:
    """Wait until the device has done all that it was told; a CPU does at once."""
    if device.type != "cpu":
        accelerator().synchronize()


def peak_memory() -> int | None:
    """The most bytes that tensors on the device ever took in this process; None on the CPU."""
    return None if kind() == "cpu" else int(accelerator().max_memory_allocated())


def memory(device: "torch.device") -> tuple[int, int]:
    """Bytes of a device's memory that nobody holds, and all of it, as its library in torch tells.

    Where that has no such question, DeepSpeed is asked, which may see what this process alone holds.
    """
    import torch

    told = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    if told is None:
        return int(accelerator().available_memory() or 0), int(accelerator().total_memory() or 0)
    free, total = told(device)
    return int(free), int(total)


def pinned(room: "torch.Tensor") -> "torch.Tensor":
    """The same room in memory from which a device copies without waiting; as it is where there is too little.

    The system lets a process pin only so much; a copy is slower then.
    """
    try:
        found: torch.Tensor = accelerator().pin_memory(room)
    except RuntimeError:
        return room
    return found


def name_of(device: "torch.device") -> str:
    """The device, as its maker calls it where that can be asked."""
    import torch

    named = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return str(named(device)) if named is not None else device.type
