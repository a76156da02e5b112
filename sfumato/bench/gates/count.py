"""What a computation does, counted at torch's dispatcher: operators, waits, copies, collectives, FLOPs.

An operator is a call that makes or changes numbers: no view, no allocation, no collective. One that takes a
list of tensors, such as `_foreach_add_`, is one, though a device may start several kernels for it.
"""

import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sfumato.bench.gates.paper import PAPER
from sfumato.planner import shapes
from sfumato.planner.kernels import RAISED, Kernels
from sfumato.planner.meter import Amount, Meter

aten = torch.ops.aten
ALLOCATIONS = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "lift_fresh", "resize_", "set_")
"""Beginnings of the names of what makes no numbers, besides views."""
OURS = ("/bench/gates/", "/planner/")
"""Files whose lines only look on."""
WRITES = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
"""What makes a tensor of Python's numbers, on the host first."""


class Counting(Meter):
    """Within it and its `kernels` every operation is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = Asked(self)
        self.begin()

    def begin(self, held: Iterable[Tensor] = ()) -> None:
        """Count from nothing. held: what is there, such as weights; autograd does not keep it for a step."""
        for tensor in held:
            self._held.append(tensor.untyped_storage())
            self._numbers[self._held[-1]._cdata] = -1
        self.flops = Amount()
        self.names: Counter[str] = Counter()
        """Every call of the dispatcher, by name."""
        self.operators = 0
        self.waits: Counter[str] = Counter()
        """Where the host waits for the device: our line or DeepSpeed's -> how often."""
        self.copies = 0
        """Copies between host and device."""
        self.collectives: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """Bytes of the whole tensors that collectives exchange, by name."""
        self.kept = 0
        """Bytes that autograd keeps for the backward pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        self.names[name] += 1
        if func is aten._local_scalar_dense.default:
            return self.answered(args[0])
        if name.startswith("c10d::"):
            self.exchange(name.removeprefix("c10d::"), args)
        elif computes(func):
            self.operators += 1
        if func in (aten._to_copy.default, aten.copy_.default):
            target = kwargs.get("device") or args[0].device
            source = args[0] if func is aten._to_copy.default else args[1]
            if target.type != source.device.type:
                return self.crossed(func, args, kwargs, source, target)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def answered(self, number: Tensor) -> Any:
        """A number that the host asks the device for: nothing has overflowed, and nothing is dropped."""
        if number.device != PAPER:
            return number.item() if number.dtype != torch.bool else bool(number)
        self.wait("item")
        return {torch.bool: False}.get(number.dtype, 1.0 if number.dtype.is_floating_point else 0)

    def crossed(self, func: Any, args: Any, kwargs: Any, source: Tensor, target: torch.device) -> Any:
        """A copy between host and device."""
        self.copies += 1
        if source.device != PAPER:
            freely = kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
            if not freely:
                self.wait("copy to the device")
            return super().__torch_dispatch__(func, (), args, kwargs)
        if not kwargs.get("non_blocking"):
            self.wait("copy to the host")
        if func is aten.copy_.default:
            return args[0]
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=target)

    def exchange(self, name: str, args: Any) -> None:
        """A collective: the largest of the tensors, or lists of tensors, that it is given is the whole."""
        self.collectives[name] += 1
        sizes = [sum(t.nbytes for t in shapes.tensors([each])) for each in args if each is not None]
        self.sent[name] += max(sizes, default=0)

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        near = [frame for frame in frames if not any(part in frame.filename for part in OURS)]
        parts = near[-1].filename.rsplit("/", 2) if near else ["", "", "?"]
        self.waits[f"{what}: {'/'.join(parts[-2:])}:{near[-1].lineno if near else 0}"] += 1

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within it what autograd keeps is noted, until `now_kept`."""
        first, found = len(self._sizes), dict[int, int]()

        def pack(tensor: Tensor) -> Tensor:
            if (number := self.number(tensor)) >= first:
                found[number] = self._sizes[number].of(1)
            return tensor

        self._found = found
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def now_kept(self) -> None:
        """The forward pass has ended: what autograd keeps now is what it keeps for the backward pass."""
        alive = set(self._numbers.values())
        self.kept += sum(size for number, size in self._found.items() if number in alive)


class Asked(Kernels):
    """A device's kernels; questions about its numbers, and what is written there, are counted."""

    def __init__(self, counting: Counting) -> None:
        super().__init__(torch.bfloat16, RAISED)
        self.counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_device = bool(args) and isinstance(args[0], Tensor) and args[0].device == PAPER
        if func is Tensor.backward:
            # A torch function suspends modes, and checkpoints compute within this one.
            with self:
                return whole_backward(*args, **kwargs)
        if on_device and func in (torch.nonzero, Tensor.nonzero, Tensor.__bool__):
            self.counting.wait(func.__name__)
            if func is Tensor.__bool__ and getattr(args[0], "is_said_finite", False):
                return True
        found = super().__torch_function__(func, types, args, kwargs)
        if func is torch.isfinite and on_device:
            found.is_said_finite = True
        if func in WRITES and found.device == PAPER and not isinstance(args[-1], Tensor):
            self.counting.copies += 1
        return found


def whole_backward(loss: Tensor, gradient: Tensor | None = None, **options: Any) -> None:
    """loss.backward(), below torch functions."""
    if gradient is None:
        gradient = torch.ones_like(loss)
    wanted = bool(options.get("retain_graph")), bool(options.get("create_graph"))
    torch.autograd.Variable._execution_engine.run_backward(
        *((loss,), (gradient,), *wanted, ()), allow_unreachable=True, accumulate_grad=True
    )


@lru_cache(None)
def computes(func: Any) -> bool:
    """Whether a call of the dispatcher makes or changes numbers; a profiler's marks do not."""
    schema = func._schema
    if schema.name.startswith("profiler::") or schema.name.removeprefix("aten::").startswith(ALLOCATIONS):
        return False
    aliases = [end.alias_info for end in schema.returns if end.alias_info is not None]
    return not aliases or any(alias.is_write for alias in aliases)
