"""Divisions by one, which are left out.

diffusers' blocks divide what they return by a factor of their config: 316 times in a step of SDXL, forward
and backward, each of them a pass over memory. The factor is 1 in all models here.
"""

from typing import Any

import torch
from torch import Tensor, nn

FACTORS = ("output_scale_factor", "rescale_output_factor")
"""What diffusers' modules call it. Configs and state_dicts have it under no such name."""

DIVISIONS = (Tensor.__truediv__, Tensor.div, torch.div)


class One(Tensor):
    """1 as a divisor: a tensor divided by it is that tensor.

    Python asks the divisor first where its class is a kind of the dividend's: no operator of torch is called.
    """

    def __rtruediv__(self, other: Any) -> Any:
        return other

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DIVISIONS and isinstance(args[1], One):  # a dividend of another kind of tensors
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> str:
        return "ONE"  # copies and pickles are the same object

    def __deepcopy__(self, memo: Any) -> "One":
        return self


ONE = torch.ones((), device="cpu").as_subclass(One)


def unscale(net: nn.Module) -> None:
    """Leave a model's divisions by exactly 1 out; its answers and gradients stay the same to the bit."""
    for module in net.modules():
        for factor in FACTORS:
            if vars(module).get(factor) == 1:
                setattr(module, factor, ONE)


def scale(net: nn.Module) -> None:
    """Undo `unscale`: divide by 1 as diffusers does."""
    for module in net.modules():
        for factor in FACTORS:
            if vars(module).get(factor) is ONE:
                setattr(module, factor, 1.0)
