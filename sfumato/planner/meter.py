"""What a computation takes: arithmetic, memory alive, and what autograd keeps. Works without numbers."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


class Meter(TorchDispatchMode):
    """Within it every operation is counted, and every new storage is followed from its birth to its end.

    A multiply-add is 2 FLOPs. `held`: tensors that were there before, such as weights; they count nothing.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops = 0
        self.recomputed = 0
        """The FLOPs among them of forward passes that were made again in the backward pass."""
        self.gradients: set[int] = set()
        """The storages, by number, that became a parameter's gradient."""
        self._backward = False
        self._events: list[
            tuple[int, int]
        ] = []  # storage's number, bytes: more at its birth, less at its end
        self._sizes: list[int] = []  # number -> bytes
        self._held = [tensor.untyped_storage() for tensor in held]  # kept: their keys stay theirs
        self._numbers: dict[int, int] = {storage._cdata: -1 for storage in self._held}  # those alive
        self._references: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = shapes.answer(func, args, kwargs or {})
        if (count := FLOPS.get(func._overloadpacket)) is not None:
            flops = count(*args, **(kwargs or {}), out_val=answer)
            self.flops += flops
            # Autograd's own formulas run without gradients, a checkpoint's second forward pass with them.
            self.recomputed += flops if self._backward and torch.is_grad_enabled() else 0
        for tensor in tree_leaves(answer):
            if isinstance(tensor, Tensor):
                self.number(tensor)
        return answer

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, in order of birth; -1 for what was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (found := self._numbers.get(key)) is not None:
            return found
        number, size = len(self._sizes), storage.nbytes()
        self._numbers[key] = number
        self._sizes.append(size)
        self._events.append((number, size))

        def ended(_: Any) -> None:
            del self._numbers[key], self._references[number]
            self._events.append((number, -size))

        self._references[number] = weakref.ref(storage, ended)
        return number

    def now(self) -> int:
        """This moment, for `peak`."""
        return len(self._events)

    def peak(self, start: int = 0, end: int | None = None) -> int:
        """The most bytes alive between two moments, without those of parameters' gradients."""
        alive = most = 0
        for moment, (number, size) in enumerate(self._events[:end]):
            if number not in self.gradients:
                alive += size
            most = max(most, alive) if moment >= start else alive
        return most

    @contextmanager
    def keeping(self, found: dict[int, int]) -> Iterator[None]:
        """Within it `found` gets number and bytes of each storage that autograd keeps for the backward pass.

        Those that were born before, as a step's inputs are, do not count.
        """
        first = len(self._sizes)

        def pack(tensor: Tensor) -> Tensor:
            if (number := self.number(tensor)) >= first:
                found[number] = self._sizes[number]
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        alive = set(self._numbers.values())
        for number in found.keys() - alive:
            del found[number]

    def backward(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Run the backward pass; gradients of the parameters are told apart from what else it makes."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p: self.gradients.add(self.number(p.grad)))
            for parameter in parameters
            if parameter.requires_grad
        ]
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
            for hook in hooks:
                hook.remove()
