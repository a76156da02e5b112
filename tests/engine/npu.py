"""An Ascend NPU where there is none: DeepSpeed's seam as torch_npu fills it, with the CPU doing the work.

Devices called "npu" can be named, asked for and compared, as torch_npu makes it so. A tensor that is moved to
one, or made on one, lies on the CPU; what has no place there, a float64, is refused as the hardware does.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

LARGEST = 3 * 2**30
"""What the stub says was the most memory in use, bytes."""


class Stream:
    """A queue of the device, which has done everything already."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "Stream":
        return self

    record = synchronize = wait = lambda self, *args: None

    def query(self) -> bool:
        return True


class Npu(CPU_Accelerator):  # type: ignore[misc]
    """DeepSpeed's accelerator of that device. `called`: how often each of its verbs was used."""

    def __init__(self, devices: int = 1) -> None:
        super().__init__()
        self._name, self._communication_backend_name = "npu", "hccl"
        self.called: Counter[str] = Counter()
        self.devices, self.index = devices, 0

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name != "called":
            self.called[name] += 1
        return super().__getattribute__(name)

    def is_synchronized_device(self) -> bool:
        return False

    def is_fp64_supported(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return "npu" if device_index is None else f"npu:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device("npu", device_index)

    def set_device(self, device_index: int) -> None:
        assert 0 <= device_index < self.devices, f"there is no npu:{device_index}"
        self.index = device_index

    def current_device(self) -> int:
        return self.index

    def current_device_name(self) -> str:
        return f"npu:{self.index}"

    def device_count(self) -> int:
        return self.devices

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return LARGEST

    def on_accelerator(self, tensor: Tensor) -> bool:
        return True

    def pin_memory(self, tensor: Tensor, make_copy: bool = True, match_shape: bool = True) -> Tensor:
        return tensor

    def current_stream(self, device_index: int | None = None) -> Stream:
        return Stream()

    default_stream = current_stream

    @property
    def Stream(self) -> type[Stream]:  # noqa: N802  DeepSpeed's name
        return Stream

    @property
    def Event(self) -> type["Stream"]:  # noqa: N802
        return Stream


class OnTheCpu(TorchDispatchMode):
    """Puts onto the CPU what is asked to be on an NPU; a float64 there is an error.

    `moved`, `pinned`: how many tensors. `strict` while all is meant to lie there: then any float64 is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.pinned = 0
        self.strict = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        options = dict(options or {})
        asked = getattr(options.get("device"), "type", None) == "npu"
        if asked:
            self.moved += 1
            options["device"] = torch.device("cpu")
        if function is torch.ops.aten._pin_memory.default:
            self.pinned += 1
            return args[0].clone()
        move = asked and function is torch.ops.aten._to_copy.default
        if move and options.get("dtype") in (None, args[0].dtype):
            found = args[0].detach()  # what lies there already stays itself
        else:
            found = function(*args, **options)
        for part in found if isinstance(found, tuple | list) else [found]:
            if (asked or self.strict) and isinstance(part, Tensor) and part.dtype == torch.float64:
                raise RuntimeError(f"{function} gives a float64, which an NPU has not")
        return found


class Written(TorchFunctionMode):
    """The same for tensors that are written out, which torch makes below `OnTheCpu`."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        options = dict(options or {})
        if function in (torch.tensor, torch.as_tensor) and "npu" in str(options.get("device")):
            made = function(*args, **options | {"device": "cpu"})
            return made.to(options["device"])
        return function(*args, **options)


@contextlib.contextmanager
def plugged_in(devices: int = 1) -> Iterator[tuple[Npu, OnTheCpu]]:
    """Within it this process computes on the stub; it stays torch's and DeepSpeed's device until it ends."""
    module: Any = ModuleType("torch.npu")
    module.config = SimpleNamespace(allow_internal_format=True)
    module.is_available = lambda: True
    module.device_count = lambda: devices
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.get_device_name = lambda device=None: "Ascend910B, a stub"
    _setup_privateuseone_for_python_backend("npu", module)
    dist.Backend.register_backend("hccl", gloo, devices=["npu", "cpu"])
    seam, mode = Npu(devices), OnTheCpu()
    set_accelerator(seam)
    with mode, Written():
        yield seam, mode


def gloo(store: Any, rank: int, size: int, timeout: Any) -> Any:
    """What stands in for HCCL."""
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def within(mode: OnTheCpu, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, strict while it runs."""

    def call(*args: Any, **options: Any) -> Any:
        mode.strict = True
        try:
            return function(*args, **options)
        finally:
            mode.strict = False

    return call
