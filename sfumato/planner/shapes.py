"""Answers without numbers, remembered: torch works out the shapes of many an operation in slow Python."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]
META = torch.device("meta")
_seen: dict[Any, Any] = {}


def answer(func: Any, args: Any, kwargs: Any) -> Any:
    """What func(*args, **kwargs) answers on the meta device, worked out once for each set of shapes."""
    if not makes_new(func):
        return func(*args, **kwargs)
    key = (func, described(args), described(tuple(kwargs.items())))
    if key in _seen:
        return restored(_seen[key])
    found = func(*args, **kwargs)
    given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
    outputs = [tensor for tensor in tree_leaves(found) if is_tensor(tensor)]
    fresh = {tensor.untyped_storage()._cdata for tensor in outputs}
    # An answer that is a part of something else cannot be made from its shape.
    if len(fresh) == len(outputs) and not fresh & given and all(t.device == META for t in outputs):
        if all(whole(tensor) for tensor in outputs):
            _seen[key] = recorded(found)
    return found


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def whole(tensor: Tensor) -> bool:
    """Whether a tensor fills its storage."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@lru_cache(None)
def makes_new(func: Any) -> bool:
    """Whether an operation's answers are new tensors, and its arguments stay as they are."""
    schema = func._schema
    ends = [*schema.arguments, *schema.returns]
    return bool(schema.returns) and all(end.alias_info is None for end in ends)


def described(value: Any) -> Any:
    """What the shape of an answer can depend on of an argument."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(described, value))
    return type(value), value


def recorded(found: Any) -> Any:
    """An answer's tensors as shape, strides and dtype."""
    if isinstance(found, Tensor):
        return found.shape, found.stride(), found.dtype
    if isinstance(found, (list, tuple)):
        return [*map(recorded, found)]
    return (found,)


def restored(said: Any) -> Any:
    """The answer that `recorded` was given, with new tensors."""
    if isinstance(said, list):
        return tuple(map(restored, said))
    if len(said) == 1:
        return said[0]
    shape, stride, dtype = said
    return torch.empty_strided(shape, stride, dtype=dtype, device=META)
