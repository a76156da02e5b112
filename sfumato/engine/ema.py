"""Averages of the fp32 weights, held in shards beside the optimizer's states, and their turn in the module.

An average is one more state tensor of the optimizer, so it has the shape of whatever shard ZeRO hands to it.
It costs 4 bytes x parameters / ranks, follows the fp32 masters, and moves only when a step is really applied.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from sfumato.engine import shards


def averaging(base: type[Optimizer]) -> type[Optimizer]:
    """A subclass of `base` that keeps averages of each weight as states, moved after each of its steps."""

    class Averaging(base):  # type: ignore[misc, valid-type]
        shares: Mapping[str, float] = {}
        """Kind of average -> how much the weights after the coming step count in it; set before each."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            # An average starts from the weights before the first step. It becomes a state after that step
            # only, because an empty state is how torch's optimizers know that they have to make theirs.
            averages = {kind: [self._average(kind, p) for p in weights] for kind in self.shares}
            result = super().step(closure)
            for kind, several in averages.items():
                if several and self.shares[kind]:
                    torch._foreach_lerp_(several, weights, self.shares[kind])
                for weight, average in zip(weights, several, strict=True):
                    self.state[weight][kind] = average
            return result

        def _average(self, kind: str, weight: torch.Tensor) -> torch.Tensor:
            kept = self.state[weight].get(kind)
            return weight.detach().clone() if kept is None else kept

    Averaging.__name__ = f"Averaging{base.__name__}"
    return Averaging


@contextmanager
def swapped(engine: Any, kind: str) -> Iterator[None]:
    """Within it DeepSpeed's module computes with an average; all ranks enter and leave it together.

    engine: DeepSpeed's. Masters and averages change places shard by shard, so it takes the memory of one
    parameter's shard, and afterwards every number is what it was, to the bit.
    """
    exchange(engine, kind)
    try:
        shards.refresh(engine)
        torch.clear_autocast_cache()
        yield
    finally:
        exchange(engine, kind)
        shards.refresh(engine)
        torch.clear_autocast_cache()


@torch.no_grad()
def exchange(engine: Any, kind: str) -> None:
    """Let this rank's masters and their averages change places."""
    states = engine.basic_optimizer.state
    for shard in shards.owned(engine, writing=True):
        average = states[shard.flat].get(kind)
        if average is not None:
            master, other = shard.master, shard.view(average)
            kept = master.clone()
            master.copy_(other)
            other.copy_(kept)
