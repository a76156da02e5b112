"""What a computation takes: arithmetic, memory alive, and what autograd keeps. Works without numbers."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from sfumato.planner import shapes

aten: Any = torch.ops.aten


def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of attention's four products in the backward pass.

    A fused kernel makes the matrix of scores once more; by custom that is not counted.
    """
    shapes = (query.shape, key.shape, value.shape)
    return 2 * sdpa_flop_count(*shapes)


BACKWARD = {
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
}
FLOPS: dict[Any, Callable[..., int]] = {**flop_registry, **dict.fromkeys(BACKWARD, attention_backward)}
_counted: dict[Any, int] = {}
"""Operations as `shapes.key_of` has them -> their FLOPs."""


@dataclass(frozen=True)
class Amount:
    """Bytes or FLOPs of a micro-batch: `fixed` of any, and `slope` for each of its samples."""

    fixed: int = 0
    slope: int = 0

    def of(self, samples: int) -> int:
        """Those of a micro-batch of so many samples."""
        return self.fixed + samples * self.slope

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.fixed + other.fixed, self.slope + other.slope)

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(self.fixed - other.fixed, self.slope - other.slope)


def again() -> bool:
    """Within a backward pass: whether this is a checkpoint's second forward pass.

    Autograd's own formulas run without gradients and save nothing; a checkpoint runs with them, and where a
    layer's own autograd.Function puts them off, its hooks still wait for what is saved.
    """
    return torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class Meter(TorchDispatchMode):
    """Within it every operation is counted, and every new storage is followed from its birth to its end.

    A multiply-add is 2 FLOPs. `held`: tensors that were there before, such as weights; they count nothing.
    `samples`: what is a multiple of it is taken to grow with the samples of the micro-batch.
    """

    def __init__(self, held: Iterable[Tensor] = (), samples: int = 1) -> None:
        super().__init__()
        self.samples = samples
        self.flops = Amount()
        self.recomputed = Amount()
        """The FLOPs among them of forward passes that were made again in the backward pass."""
        self.gradients: set[int] = set()
        """The storages, by number, that became a parameter's gradient."""
        self._backward = False
        self._events: list[tuple[int, bool]] = []  # storage's number, whether it is born or ends
        self._sizes: list[Amount] = []  # number -> bytes
        self._held = [tensor.untyped_storage() for tensor in held]  # kept: their keys stay theirs
        self._numbers: dict[int, int] = {storage._cdata: -1 for storage in self._held}  # those alive
        self._references: dict[int, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's question whether it guards every operation against torch.compile: nobody compiles here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In the backward pass function modes would look at everything that is done here.
        with torch._C.DisableTorchFunction():
            key = shapes.key_of(func, args, kwargs)
            answer = shapes.answer(func, args, kwargs, key)
            if (count := FLOPS.get(func._overloadpacket)) is not None:
                if key is None or key not in _counted:
                    _counted[key] = count(*args, **kwargs, out_val=answer)
                flops = self.amount(_counted[key])
                self.flops += flops
                if self._backward and again():
                    self.recomputed += flops
            for tensor in shapes.tensors(answer):
                self.number(tensor)
        return answer

    def amount(self, total: int) -> Amount:
        """Bytes or FLOPs of an operation by what they do with more samples."""
        share, rest = divmod(total, self.samples)
        return Amount(total) if rest else Amount(0, share)

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, in order of birth; -1 for what was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (found := self._numbers.get(key)) is not None:
            return found
        number = len(self._sizes)
        self._numbers[key] = number
        self._sizes.append(self.amount(storage.nbytes()))
        self._events.append((number, True))

        def ended(_: Any) -> None:
            del self._numbers[key], self._references[number]
            self._events.append((number, False))

        self._references[number] = weakref.ref(storage, ended)
        return number

    def now(self) -> int:
        """This moment, for `peak`."""
        return len(self._events)

    def peaks(self, end: int | None = None) -> tuple[Amount, ...]:
        """The bytes alive at the moments until `end` that can be the fullest, for some number of samples.

        Those of parameters' gradients do not count.
        """
        fixed, slope, most = 0, 0, dict[int, int]()
        for number, born in self._events[:end]:
            if number not in self.gradients:
                size = self._sizes[number]
                fixed += size.fixed if born else -size.fixed
                slope += size.slope if born else -size.slope
                most[slope] = max(fixed, most.get(slope, fixed))
        found = list[Amount]()
        for slope in sorted(most, reverse=True):
            moment = Amount(most[slope], slope)
            if not found or moment.of(1) > found[-1].of(1):
                found.append(moment)
        return tuple(found)

    @contextmanager
    def keeping(self, found: dict[int, Amount], every: bool = False) -> Iterator[None]:
        """Within it `found` gets number and bytes of each storage that autograd keeps for the backward pass.

        Those that were born before, as a step's inputs are, do not count. every: what lives on at its end,
        for "selective" checkpointing keeps most beside autograd.
        """
        first = len(self._sizes)

        def pack(tensor: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                number = self.number(tensor)
            if number >= first:
                found[number] = self._sizes[number]
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        alive = set(self._numbers.values())
        if every:
            found |= {number: self._sizes[number] for number in alive if number >= first}
        for number in found.keys() - alive:
            del found[number]

    def backward(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Run the backward pass; gradients of the parameters are told apart from what else it makes."""
        self._backward = True
        try:
            # Not loss.backward(): a torch function suspends function modes, and checkpoints run within it.
            torch.autograd.Variable._execution_engine.run_backward(
                *((loss,), (torch.ones_like(loss),), False, False, ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )
        finally:
            self._backward = False
        with torch._C.DisableTorchFunction():
            self.gradients |= {self.number(p.grad) for p in parameters if p.grad is not None}
