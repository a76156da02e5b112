"""A device that computes nothing: a real engine runs on it at full size, and its operations can be counted.

It is torch's meta device behind DeepSpeed's seam, with a process group that sends nothing. Tensors that a
loader makes lie on the CPU, as in a run, so that a copy between the two is seen as what it is.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor

from sfumato import device
from sfumato.engine.ranks import Ranks
from sfumato.planner.kernels import Kernels

PAPER = torch.device("meta")


class Stream:
    """A queue of the device, in which nothing waits."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "Stream":
        return self

    wait = wait_event = wait_stream = record = synchronize = lambda self, *args: None

    def query(self) -> bool:
        return True


class Paper(CPU_Accelerator):
    """DeepSpeed's accelerator of that device."""

    def __init__(self, waits: Callable[[str], None]) -> None:
        """waits: hears of every wait for the device."""
        super().__init__()
        self._name, self.waits = PAPER.type, waits

    def is_synchronized_device(self) -> bool:
        return False

    def is_fp16_supported(self) -> bool:
        return True

    def device_name(self, device_index: int | None = None) -> str:
        return PAPER.type

    def device(self, device_index: int | None = None) -> torch.device:
        return PAPER

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return PAPER.type

    def device_count(self) -> int:
        return 1

    def synchronize(self, device_index: int | None = None) -> None:
        self.waits("synchronize")

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device == PAPER

    def pin_memory(self, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        return tensor

    def current_stream(self, device_index: int | None = None) -> Stream:
        return Stream()

    default_stream = current_stream

    @property
    def Stream(self) -> Any:  # noqa: N802  DeepSpeed's name
        return Stream

    @property
    def Event(self) -> Any:  # noqa: N802
        return Stream


@contextmanager
def on_paper(world: int, kernels: Kernels, waits: Callable[[str], None]) -> Iterator[Ranks]:
    """Within it this process is the first of `world` ranks on that device.

    kernels: what torch.autocast means there. A process group, if there is one, is left and not made again.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = get_accelerator()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    said = {name: os.environ.get(name) for name in place}
    real = torch.autocast

    def autocast(kind: str, *args: Any, **options: Any) -> Any:
        if kind != PAPER.type:
            return real(kind, *args, **options)
        return kernels.autocast() if options.get("enabled", True) else nullcontext()

    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    try:
        set_accelerator(Paper(waits))
        os.environ |= place
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        with ExitStack() as held:
            held.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", FutureWarning)  # of DeepSpeed's own calls
            held.enter_context(replaced(torch, "autocast", autocast))
            held.enter_context(replaced(Tensor, "record_stream", lambda *_: None))
            held.enter_context(replaced(device, "FUSED", (*device.FUSED, PAPER.type)))
            for kind in ("fused", "foreach"):
                name = f"_get_{kind}_kernels_supported_devices"
                for module in map(import_module, ("torch.utils._foreach_utils", "torch.optim.optimizer")):
                    if hasattr(module, name):
                        known = [*getattr(module, name)(), PAPER.type]
                        held.enter_context(replaced(module, name, lambda known=known: known))
            deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
            yield Ranks(0, world, PAPER)
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        set_accelerator(before)
        for name, value in said.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it an attribute is another."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
