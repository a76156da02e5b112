"""Which part of which parameter this rank's optimizer owns, at every ZeRO stage.

The one place that reads DeepSpeed's private tables: `_hp_mapping` at stages 1 and 2, `grad_position` at
stage 3 (written for 0.19.8; `tests/engine` has a test for every stage and number of ranks). A `Shard` names a
slice of a parameter by (name, start, length), so that what is written on some ranks at some stage can be read
on others at another.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sfumato.device import synchronize
from sfumato.engine.swap import brought, hand_over

Read = Callable[[str, int, int], Tensor]
"""(parameter name, start, length) -> that slice of the flattened parameter, 1-D."""


class Unfilled(TorchFunctionMode):
    """Inside it modules are built without drawing their random weights, which `fill` overwrites."""

    DRAWS = (torch.Tensor.uniform_, torch.Tensor.normal_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.DRAWS else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Shard:
    """A slice of a parameter that this rank owns, as views into the optimizer's fp32 memory."""

    name: str
    start: int
    """First element in the flattened parameter."""
    flat: Tensor
    """The optimizer's own tensor, the key of its state."""
    offset: int
    """First element in `flat`."""
    length: int

    def view(self, tensor: Tensor) -> Tensor:
        """The part of a tensor shaped like `flat` that belongs to this shard, (length,)."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)

    @property
    def master(self) -> Tensor:
        """The fp32 weights, (length,)."""
        return self.view(self.flat)


def owned(engine: object, writing: bool = False) -> Iterator[Shard]:
    """This rank's shards, each with its numbers in memory until the next one is asked for.

    The numbers of one that waits on a disk are there no longer after that; writing: put back what they are
    by then. In the order of the module's parameters, at stage 3 by the groups that are stepped at once.
    """
    if engine.zero_optimization_stage() < 3:  # type: ignore[attr-defined]
        yield from listed(engine)
        return
    groups: dict[int, list[Shard]] = {}
    for shard, group in _partitioned(engine):
        groups.setdefault(group, []).append(shard)
    for group, several in sorted(groups.items()):
        with brought(engine, group, writing):
            yield from several


def listed(engine: object) -> Iterator[Shard]:
    """This rank's shards as `owned` gives them, but with numbers only where these never leave the memory."""
    stage = engine.zero_optimization_stage()  # type: ignore[attr-defined]
    if stage == 3:
        yield from (shard for shard, _ in sorted(_partitioned(engine), key=lambda pair: pair[1]))
        return
    find = _mapped if stage else _whole
    for name, parameter in learning(engine):
        yield from find(engine, name, parameter)


def learning(engine: object) -> Iterator[tuple[str, Tensor]]:
    """The parameters that learn, by name."""
    for name, parameter in engine.module.named_parameters():  # type: ignore[attr-defined]
        if parameter.requires_grad:
            yield name, parameter


def _whole(engine, name: str, parameter: Tensor) -> Iterator[Shard]:  # type: ignore[no-untyped-def]
    """Stage 0: every rank steps every parameter itself."""
    yield Shard(name, 0, parameter, 0, parameter.numel())


def _mapped(engine, name: str, parameter: Tensor) -> Iterator[Shard]:  # type: ignore[no-untyped-def]
    """Stages 1 and 2: a parameter's fragment in the rank's flat partition of its group."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None:
        flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
        start = mapping.lp_fragment_address.start
        yield Shard(name, start, flat, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)


def _partitioned(engine) -> Iterator[tuple[Shard, int]]:  # type: ignore[no-untyped-def]
    """Stage 3: each parameter is cut into equal parts, the last ones padded; with the group of its step."""
    zero = engine.optimizer
    for name, parameter in learning(engine):
        group, offset, part = zero.grad_position[zero.get_param_id(parameter)]
        start = part * torch.distributed.get_rank()
        length = min(part, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if length > 0:
            yield Shard(name, start, zero.fp32_partitioned_groups_flat[group], offset, length), group


@torch.no_grad()
def fill(engine: object, read: Read) -> None:
    """Write this rank's fp32 masters from `read`, and then the weights that the forward pass uses.

    All ranks call it together. Writing the masters directly keeps the digits that a bf16 model on its way
    into DeepSpeed would round off.
    """
    for shard in owned(engine, writing=True):
        shard.master.copy_(read(shard.name, shard.start, shard.length))
    refresh(engine)


@torch.no_grad()
def fill_frozen(engine: object, read: Read) -> None:
    """Write what this rank keeps of the parameters that do not learn; `fill` makes them usable."""
    for name, parameter in engine.module.named_parameters():  # type: ignore[attr-defined]
        if not parameter.requires_grad:
            start, own = own_part(parameter)
            own.copy_(read(name, start, len(own)))


def own_part(frozen: Tensor) -> tuple[int, Tensor]:
    """What this rank keeps of a frozen parameter: the first element's number, and the numbers, 1-D."""
    if not hasattr(frozen, "ds_tensor"):
        return 0, frozen.detach().view(-1)
    part = frozen.ds_tensor.numel()
    start = part * torch.distributed.get_rank()
    length = max(0, min(part, frozen.ds_numel - start))  # type: ignore[attr-defined]
    return start, frozen.ds_tensor.detach().view(-1)[:length]


@torch.no_grad()
def refresh(engine) -> None:  # type: ignore[no-untyped-def]
    """Make the low-precision weights equal to the masters, on all ranks together."""
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    if stage == 3:
        zero = engine.optimizer
        zero._partition_all_parameters()
        forget_second_copies(engine)
        for group in range(len(zero.fp16_groups)):
            with brought(engine, group):
                zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


@torch.no_grad()
def settle_gradients(engine) -> None:  # type: ignore[no-untyped-def]
    """Before a step of stage 3: what no loss has reached has a gradient of zero.

    DeepSpeed 0.19.8 would step it with the gradient of an earlier step.
    """
    zero = engine.optimizer
    synchronize(engine.device)
    sums = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    for parameter in (parameter for several in zero.fp16_groups for parameter in several):
        group, start, length = zero.grad_position[zero.get_param_id(parameter)]
        reached = parameter.ds_id in zero._offload_boundary_param_ids
        if not reached:
            sums[parameter.ds_id].zero_()
        if (
            not hand_over(zero, group, start, sums[parameter.ds_id])
            and zero.offload_optimizer
            and not reached
        ):
            zero.fp32_partitioned_groups_flat[group].grad.narrow(0, start, length).zero_()


def forget_second_copies(engine) -> None:  # type: ignore[no-untyped-def]
    """Have ZeRO++'s copies among neighbouring ranks made anew: the backward pass reads the weights there."""
    for parameter in engine.module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The whole shape of a parameter, also where stage 3 has put it away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def size_of(parameter: Tensor) -> int:
    """The numbers of a whole parameter."""
    return math.prod(shape_of(parameter))
