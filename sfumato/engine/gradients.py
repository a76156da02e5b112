"""Stages 1 and 2 with one flat gradient, and one question to the device in a step.

DeepSpeed 0.19.8 handles gradients one by one: two copies of each into buckets, thirteen operators to see
whether it is finite, four for its norm, and three waits for the device. Here a bucket is joined at once,
summed over the ranks (not at all by a single one), and added to the rank's part at once; one norm tells both
how long the gradient is and whether it is finite, since no number that is not leaves a norm finite.

A bucket's sum travels while the backward pass fills the next one, to the ranks that own its parameters
alone: half of what a sum on all ranks sends.

The host waits for that norm once a step, before a weight moves. It must know: a step that is not applied
decides which batch comes next, what its learning rate is, and in fp16 the scale of the next loss.

Written for the releases that TESTED names, of whose optimizer this is a subclass. The layout of weights,
masters and states stays its own, and whatever `fits` does not know is left to it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import (
    INITIAL_MICRO_STEP_ID,
    OPTIMIZER_ALLGATHER_TIMER,
    OPTIMIZER_GRADIENTS_TIMER,
    OPTIMIZER_STEP_TIMER,
    OPTIMIZER_TIMERS,
    DeepSpeedZeroOptimizer,
)
from torch import Tensor

from sfumato.engine.ds_config import MOST_PIECES

TESTED = ("0.19.8",)
"""The releases of DeepSpeed that this was written for; another one keeps its own way."""
REPLACED = (
    *("setup_buckets", "reduce_independent_p_g_buckets_and_remove_grads", "reduce_ipg_grads"),
    *("independent_gradient_partition_epilogue", "step"),
)
"""Its methods that are another's here."""
EXPECTED: dict[str, Any] = {
    "contiguous_gradients": True, "reduce_scatter": True, "use_multi_rank_bucket_allreduce": True,
    "gradient_average": True, "compute_grad_norm": True,
    "overlap_comm": False, "cpu_offload": False, "zenflow": False, "has_moe_layers": False,
    "custom_loss_scaler": False, "sequence_parallel_size": 1, "model_parallel_world_size": 1,
    "torch_autocast_gradscaler": None, "autoep_folding_tp_group": None,
}  # fmt: skip
"""What its optimizer must say of itself to be taken over."""


def take_over(engine: Any) -> bool:
    """Have DeepSpeed's engine, which has not trained, handle gradients in this way; whether it does."""
    zero = engine.optimizer
    if not fits(zero):
        return False
    for name in REPLACED:
        assert name in vars(DeepSpeedZeroOptimizer), f"DeepSpeed {deepspeed.__version__} has no {name}"
    zero.__class__ = Flat
    zero.lay_out()
    return True


def fits(zero: Any) -> bool:
    """Whether an optimizer is DeepSpeed's of stages 1 and 2, with settings that are known here."""
    return (
        deepspeed.__version__.partition("+")[0] in TESTED
        and type(zero) is DeepSpeedZeroOptimizer
        and all(getattr(zero, name) == value for name, value in EXPECTED.items())
        and len(zero.ipg_buckets) == 1
        and "muon" not in type(zero.optimizer).__name__.lower()
    )


class Travel(NamedTuple):
    """A bucket that is being summed: what to wait for, its parameters (group, number), their gradients."""

    pieces: list[Any]
    names: list[tuple[int, int]]
    parts: list[Tensor]


class Flat(DeepSpeedZeroOptimizer):
    """DeepSpeed's optimizer, where a group of one learning rate has one gradient on a rank."""

    ready_for_gradients: bool

    def lay_out(self) -> None:
        """Find where each parameter's gradient lies in its group's."""
        self.rooms: list[dict[int, tuple[int, int]]] = []
        """For each group: a parameter's number -> how much of it other ranks have before, and its cut."""
        self.cuts: list[list[int]] = []
        """For each group: the lengths of all cuts of its gradient, between parameters' there may be gaps."""
        self.open: dict[int, tuple[Tensor, ...]] = {}
        """The groups whose gradient has begun: its cuts."""
        self.spots: list[dict[int, int]] = []
        """For each group: a parameter's number -> where it lies in the flat weights of all ranks."""
        self.under_way: Travel | None = None
        """The bucket that is being summed."""
        for group, (params, whole) in enumerate(zip(self.bit16_groups, self.bit16_groups_flat, strict=True)):
            begin, size = whole.storage_offset(), int(self.partition_size[group])
            self.spots.append({self.get_param_id(p): p.data.storage_offset() - begin for p in params})
            first, end = size * dist.get_rank(group=self.real_dp_process_group[group]), 0
            rooms, cuts = dict[int, tuple[int, int]](), list[int]()
            for param in params:
                number = self.get_param_id(param)
                start = max(0, first - self.spots[group][number])
                place = self.spots[group][number] + start - first
                if start >= param.numel() or place >= size:
                    continue
                cuts += [place - end] if place > end else []
                rooms[number] = start, len(cuts)
                cuts.append(min(param.numel() - start, size - place))
                end = place + cuts[-1]
            self.rooms.append(rooms)
            self.cuts.append([*cuts, size - end])
            assert min(self.cuts[-1]) >= 0 and sum(self.cuts[-1]) == size, "a gradient of another layout"

    def setup_buckets(self) -> None:
        """Begin a micro-batch; no room is taken before there is something to join."""
        if not self.ready_for_gradients:
            self.micro_step_id += 1
            self.ready_for_gradients = True

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any, i: int) -> None:
        """Take a parameter's gradient into the bucket, after what is in a full one has left it."""
        if param.numel() == 0:
            return
        bucket = self.ipg_buckets[self.get_param_comm_dtype(param)]
        if bucket.elements + param.numel() > self.reduce_bucket_size:
            self.reduce_ipg_grads()
        bucket.grads.append(self.get_gradient_for_reduction(param))
        bucket.params.append((i, param.param_idx_in_group, self.get_param_id(param)))
        bucket.elements += param.numel()

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Send the bucket off to be summed, after the one before it has arrived, and empty it."""
        ((dtype, bucket),) = self.ipg_buckets.items()
        self.arrive()
        if not bucket.params:
            return
        # By their places, so that what one rank owns lies together.
        order = sorted(range(len(bucket.params)), key=lambda n: self.place(bucket.params[n]))
        names = [(bucket.params[n][0], bucket.params[n][2]) for n in order]
        parts = [bucket.grads[n].reshape(-1) for n in order]
        world = dist.get_world_size(group=self.dp_process_group)
        if world > 1:
            joined, lengths = torch.cat(parts).div_(world), [len(part) for part in parts]
            summed = joined.to(dtype)
            self.under_way = Travel(
                self.sent(summed, self.pieces(names, lengths)), names, [*summed.split(lengths)]
            )
        else:
            self.keep(names, parts)
        del parts
        self.let_go(bucket)
        bucket.clear()

    def place(self, param: tuple[int, int, int]) -> tuple[int, int]:
        """Where a parameter of a bucket lies: its group, and its spot there."""
        group, _, number = param
        return group, self.spots[group][number]

    def pieces(self, names: list[tuple[int, int]], lengths: list[int]) -> list[tuple[int, int]]:
        """A bucket cut by owner: (rank, how many numbers), one after another."""
        found: list[tuple[int, int]] = []
        for (group, number), length in zip(names, lengths, strict=True):
            size, at = int(self.partition_size[group]), self.spots[group][number]
            end = at + length
            while at < end:
                owner = at // size
                cut = min(end, (owner + 1) * size)
                before = found.pop()[1] if found and found[-1][0] == owner else 0
                found.append((owner, before + cut - at))
                at = cut
        return found

    def sent(self, summed: Tensor, pieces: list[tuple[int, int]]) -> list[Any]:
        """Have the ranks begin to sum a bucket in place, right at least where a piece is its owner's."""
        group = self.dp_process_group
        if len(pieces) > MOST_PIECES:
            return [dist.all_reduce(summed, group=group, async_op=True)]
        cut = summed.split([length for _, length in pieces])
        return [
            dist.reduce(piece, dist.get_global_rank(group, owner), group=group, async_op=True)
            for (owner, _), piece in zip(pieces, cut, strict=True)
        ]

    def arrive(self) -> None:
        """Add this rank's part of the bucket that is under way, if there is one, to its gradients."""
        if self.under_way is None:
            return
        travel, self.under_way = self.under_way, None
        for piece in travel.pieces:
            piece.wait()
        self.keep(travel.names, travel.parts)

    def let_go(self, bucket: Any) -> None:
        """Free the gradients of a bucket's parameters."""
        bucket.grads.clear()
        for group, index, _ in bucket.params:
            self.clear_grad_attribute(self.bit16_groups[group][index])

    def keep(self, names: list[tuple[int, int]], parts: list[Tensor]) -> None:
        """Add what this rank owns of some gradients to what it has; names: their groups and numbers."""
        to, of = [], []
        for (group, number), part in zip(names, parts, strict=True):
            if number not in self.rooms[group]:
                continue
            start, cut = self.rooms[group][number]
            to.append(room := self.begun(group)[cut])
            of.append(part if len(part) == len(room) else part.narrow(0, start, len(room)))
        if to:
            self.add(to, of)

    def begun(self, group: int) -> tuple[Tensor, ...]:
        """The cuts of a group's gradient, which is zero where nothing was added to it yet."""
        if group not in self.open:
            master = self.single_partition_of_fp32_groups[group]
            flat = torch.zeros(len(master), dtype=self.gradient_accumulation_dtype, device=master.device)
            self.averaged_gradients[group] = [flat]
            self.open[group] = flat.split(self.cuts[group])
        return self.open[group]

    def add(self, to: list[Tensor], of: list[Tensor]) -> None:
        """Add tensors to others of the same lengths."""
        torch._foreach_add_(to, of)

    def independent_gradient_partition_epilogue(self) -> None:
        """End a micro-batch."""
        self.reduce_ipg_grads()
        self.arrive()
        self.ready_for_gradients = False
        self._clear_param_grad_only()
        self._epilogue_ran_this_backward = True

    def norm(self) -> Tensor:
        """The length of the whole gradient, () fp32 on the device, the same on all ranks."""
        own = [part for group in range(len(self.cuts)) for part in self.begun(group) if len(part)]
        found = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(own, 2, torch.float32)))
        if dist.get_world_size(group=self.dp_process_group) == 1:
            return found
        found = found.square()
        dist.all_reduce(found, group=self.dp_process_group)
        return found.sqrt()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move the weights; nothing is changed, on all ranks alike, where the gradient is not finite."""
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        with self.timed(OPTIMIZER_GRADIENTS_TIMER):
            norm, scale = float(self.norm()), self.loss_scale
        self.overflow = not math.isfinite(norm)
        self._update_scale(self.overflow)
        self._global_grad_norm = norm / scale if math.isfinite(norm) else math.inf
        self.open.clear()
        if self.overflow:
            self.averaged_gradients.clear()
            return
        longer = (self._global_grad_norm + 1e-6) / self.clip_grad if self.clip_grad else 1.0
        with self.timed(OPTIMIZER_STEP_TIMER):
            for group in range(len(self.cuts)):
                self.move(group, 1 / (scale * max(1.0, longer)))
        with self.timed(OPTIMIZER_ALLGATHER_TIMER):
            if dist.get_world_size(group=self.dp_process_group) > 1:
                all_gather_dp_groups(
                    groups_flat=self.bit16_groups_flat,
                    partitioned_param_groups=self.parallel_partitioned_bit16_groups,
                    dp_process_group=self.real_dp_process_group,
                    start_alignment_factor=self.nccl_start_alignment_factor,
                    allgather_bucket_size=self.allgather_bucket_size,
                )
        self.timers.log(OPTIMIZER_TIMERS)

    def move(self, group: int, factor: float) -> None:
        """Step a group with its gradient times a factor, and round its masters to this rank's weights."""
        master = self.single_partition_of_fp32_groups[group]
        (flat,) = self.averaged_gradients.pop(group)
        master.grad = flat.to(master.dtype)
        self.free_grad_in_param_list(self.bit16_groups[group])
        del flat
        if factor != 1:
            master.grad.mul_(factor)
        self._optimizer_step(group)
        master.grad = None
        rank = dist.get_rank(group=self.real_dp_process_group[group])
        self.parallel_partitioned_bit16_groups[group][rank].data.copy_(master.data)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Within it a timer of DeepSpeed's runs, if it is asked for its breakdown."""
        self.timers(name).start()
        yield
        self.timers(name).stop()
