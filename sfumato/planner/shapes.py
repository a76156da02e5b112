"""Answers without numbers, remembered: torch works out the shapes of many an operation in slow Python."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]
META = torch.device("meta")
SAME = {torch.ops.aten._unsafe_view.default: torch.ops.aten.view.default}
"""Operations that give what another one gives, in slow Python."""
_seen: dict[Any, Any] = {}


def key_of(func: Any, args: Any, kwargs: Any) -> Any:
    """What an answer without numbers can depend on; None where an argument is changed or is a part of it."""
    if func in SAME or not makes_new(func):
        return None
    return func, described(args), described(tuple(kwargs.items())) if kwargs else ()


def answer(func: Any, args: Any, kwargs: Any, key: Any) -> Any:
    """func(*args, **kwargs), worked out once for each `key_of` them if it is on the meta device."""
    if key is None:
        return SAME.get(func, func)(*args, **kwargs)
    if (said := _seen.get(key)) is not None:
        return restored(said)
    found = func(*args, **kwargs)
    given = {tensor.untyped_storage()._cdata for tensor in tensors((args, tuple(kwargs.values())))}
    outputs = [*tensors(found)]
    fresh = {tensor.untyped_storage()._cdata for tensor in outputs}
    # An answer that is a part of something else cannot be made from its shape; one without tensors, as
    # item() has, is a number, and those of real tensors are not alike.
    apart = bool(outputs) and len(fresh) == len(outputs) and not fresh & given
    if apart and all(tensor.device == META and whole(tensor) for tensor in outputs):
        _seen[key] = recorded(found)
    return found


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an operation's arguments or answer."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


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
        return tuple([described(part) for part in value])
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
