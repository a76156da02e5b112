"""Do all ranks still hold the same bits? A sum over them, exact, compared by one small all-gather.

What is equal on all ranks depends on the ZeRO stage. At every stage: buffers, the counters of steps, the loss
scale. At stage 0 also all weights and the optimizer's states. At 1 and 2 all weights, which the forward
pass uses; each rank has its own part of the states. At 3 the small weights that stay whole everywhere.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.engine.engine import Engine

CHUNK = {"cpu": 2**16}  # words of 8 bytes that are summed at once: their products stay in its cache
LARGE = 2**22  # the same on a device, where every call costs


def check(engine: "Engine") -> None:
    """Raise UserError, on all ranks alike, where one holds other bits than the others.

    All ranks call it together, between two steps. It reads every tensor that is held alike once, keeps 8
    bytes for each, and waits for the device once. With one rank it does nothing.
    """
    if engine.ranks.world == 1:
        return
    names, sums = summed(engine)
    own = torch.stack(sums)  # (N,) int64
    every = [torch.empty_like(own) for _ in range(engine.ranks.world)]
    dist.all_gather(every, own)
    table = torch.stack(every)  # (world, N)
    if not bool((table != table[0]).any()):
        return
    differing = [column for column, same in enumerate((table == table[0]).all(0).tolist()) if not same]
    values = table[:, differing[0]].tolist()
    raise UserError(
        f"the same {names[differing[0]]} on all ranks at step {engine.step_count}",
        f"{odd(values)}; {len(differing)} of {len(names)} tensors and counters differ",
        "start again: the last checkpoint was made before this check. If it comes again, test that machine's "
        "memory, or set engine.compare_every lower to see when it begins",
    )


def odd(values: Sequence[int]) -> str:
    """Which ranks hold another value than most, in words."""
    (value, count), *others = Counter(values).most_common()
    if others and others[0][1] == count:
        kinds = [[rank for rank, mine in enumerate(values) if mine == kind] for kind in dict.fromkeys(values)]
        return "each of these holds other bits: rank " + " / rank ".join(
            ", ".join(map(str, k)) for k in kinds
        )
    ranks = [rank for rank, mine in enumerate(values) if mine != value]
    return f"other bits than most hold on rank {', '.join(map(str, ranks))} of {len(values)}"


def summed(engine: "Engine") -> tuple[list[str], list[Tensor]]:
    """Names and checksums of all that is equal on all ranks, in the same order on each."""
    device = engine.ranks.device
    names, sums = [], []
    for name, tensor in alike(engine):
        names.append(name)
        sums.append(checksum(tensor).to(device))
    for name, number in counters(engine):
        names.append(name)
        sums.append(checksum(torch.tensor(number, dtype=torch.float64)).to(device))
    return names, sums


def alike(engine: "Engine") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that all ranks hold alike, with its name for messages."""
    stage = engine.deepspeed.zero_optimization_stage()
    module = engine.deepspeed.module
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if stage == 3:
        # Gathered after each step, and never put away.
        for parameter in engine.deepspeed.optimizer.persistent_parameters:
            yield f"weight {names[id(parameter)]}", parameter
    else:
        for name, parameter in module.named_parameters():
            yield f"weight {name}", parameter
    for name, buffer in module.named_buffers():
        yield f"buffer {name}", buffer
    if stage == 0:
        yield from _states(engine.deepspeed.basic_optimizer, names)


def _states(optimizer: Any, names: dict[int, str]) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's states, and in fp16 its fp32 weights, which are other tensors than the module's."""
    for group, settings in enumerate(optimizer.param_groups):
        for number, weight in enumerate(settings["params"]):
            name = names.get(id(weight), f"{group}.{number} of the optimizer")
            if id(weight) not in names:
                yield f"master {name}", weight
            for kind, state in sorted(optimizer.state.get(weight, {}).items()):
                if torch.is_tensor(state):
                    yield f"{kind} of {name}", state


def counters(engine: "Engine") -> Iterator[tuple[str, float]]:
    """Numbers that every rank counts for itself."""
    yield "count of applied steps", engine.step_count
    yield "count of batches", getattr(engine, "position", 0)
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    yield "loss scale", float(getattr(scaler, "cur_scale", 0))


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A number of a tensor's bits, () int64 on its device: sum of word i times 2 i + 1, modulo 2^64.

    Integers are exact in any order. An odd factor has an inverse modulo 2^64, so a change within any one
    word of 8 bytes always changes the sum; the factors differ, so that moved words do.
    """
    flat = tensor.detach().reshape(-1)
    per_word = 8 // flat.element_size()
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    chunk = CHUNK.get(flat.device.type, LARGE)
    factors = 2 * torch.arange(min(chunk, flat.numel() // per_word), device=flat.device) + 1
    whole = flat.numel() // per_word * per_word
    for start in range(0, whole, chunk * per_word):
        part = flat[start : min(start + chunk * per_word, whole)]
        if part.storage_offset() % per_word or part.data_ptr() % 8:
            part = part.clone()
        words = part.view(torch.int64)
        total += (words * factors[: len(words)]).sum() + 2 * (start // per_word) * words.sum()
    rest = flat[whole:]
    if len(rest):
        padded = torch.zeros(per_word, dtype=flat.dtype, device=flat.device)
        padded[: len(rest)] = rest
        total += padded.view(torch.int64)[0] * (2 * (whole // per_word) + 1)
    return total
