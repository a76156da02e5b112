"""Whether the ranks' collectives compute what they should, on numbers that differ from rank to rank.

Each operation is called as DeepSpeed calls it, and awaited on all ranks before the next, so that one that
hangs or is left out on some rank is named, with that rank. Every rank knows what all give, and so what the
answer must be: integers exactly, floats in float64.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

from sfumato.doctor.lines import Line, bad, good, unseen
from sfumato.doctor.rounds import Answer, Rounds, named, trouble
from sfumato.engine.ranks import Ranks

COUNT = 2**14  # numbers of one operation, over all ranks where it cuts them up
LIMIT = 10.0  # seconds of one operation; the first may set up connections
SHOWN = 4  # lines of what is wrong
NOTED = 0.2  # share of a rank's numbers from which on they are named as too many or missing


def given(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """What a rank gives, (count,) on the CPU: integers up to 2^20, or normal numbers, in the dtype."""
    generator = torch.Generator().manual_seed(7919 + rank)
    if dtype == torch.int32:
        return torch.randint(-(2**20), 2**20, (count,), generator=generator, dtype=torch.int32)
    return torch.randn(count, generator=generator).to(dtype)


def all_reduce(place: Ranks, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The sum, what it should be, and what each rank gave; float64 or integers on the CPU."""
    mine = given(place.rank, COUNT, dtype).to(place.device)
    dist.all_reduce(mine)
    parts = [exact(given(rank, COUNT, dtype)) for rank in range(place.world)]
    return mine, summed(parts), parts


def in_shares(place: Ranks, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """What this rank gives to a sum of which each rank gets an equal share, and what all give to its own."""
    share = max(8, COUNT // place.world)
    given_by = [given(rank, share * place.world, dtype) for rank in range(place.world)]
    own = slice(place.rank * share, (place.rank + 1) * share)
    return given_by[place.rank].to(place.device), [exact(part)[own] for part in given_by]


def reduce(place: Ranks, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """This rank's part of the sum; each goes to its owner alone, all at the same time."""
    mine, parts = in_shares(place, dtype)
    pieces = mine.chunk(place.world)
    for travel in [dist.reduce(piece, owner, async_op=True) for owner, piece in enumerate(pieces)]:
        travel.wait()
    return pieces[place.rank], summed(parts), parts


def reduce_scatter(place: Ranks, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """This rank's part of the sum, cut up as it is summed."""
    mine, parts = in_shares(place, dtype)
    part = torch.empty(len(parts[0]), dtype=dtype, device=place.device)
    dist.reduce_scatter_fn(part, mine)
    return part, summed(parts), parts


def all_gather(place: Ranks, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All ranks' numbers in a row."""
    share = max(8, COUNT // place.world)
    mine = given(place.rank, share, dtype).to(place.device)
    whole = torch.empty(share * place.world, dtype=dtype, device=place.device)
    dist.allgather_fn(whole, mine)
    parts = [exact(given(rank, share, dtype)) for rank in range(place.world)]
    rows = torch.zeros(place.world, place.world * share, dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        rows[rank, rank * share : (rank + 1) * share] = part
    return whole, rows.sum(0), [*rows]


def broadcast(place: Ranks, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The last rank's numbers."""
    mine = given(place.rank, COUNT, dtype).to(place.device)
    dist.broadcast(mine, src=place.world - 1)
    parts = [torch.zeros(COUNT) for _ in range(place.world)]
    parts[-1] = exact(given(place.world - 1, COUNT, dtype))
    return mine, parts[-1], parts


OPERATIONS: dict[str, Callable[[Ranks, torch.dtype], tuple[Tensor, Tensor, list[Tensor]]]] = {
    "all-reduce": all_reduce,
    "reduce": reduce,
    "reduce-scatter": reduce_scatter,
    "all-gather": all_gather,
    "broadcast": broadcast,
}


def exact(numbers: Tensor) -> Tensor:
    """The same numbers where sums of them are exact, or nearly."""
    return numbers.cpu().to(torch.int64 if numbers.dtype == torch.int32 else torch.float64)


def summed(parts: list[Tensor]) -> Tensor:
    """The sum of parts."""
    return torch.stack(parts).sum(0)


def bound(dtype: torch.dtype, world: int, sums: bool) -> float:
    """The relative error that rounding in `world` - 1 sums may leave; 0 where nothing is rounded."""
    if dtype == torch.int32 or not sums:
        return 0.0
    return torch.finfo(dtype).eps / 2 * math.sqrt(world)


def compare(place: Ranks, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Do one operation: the error of its answer here, and the ranks whose numbers look wrong in it."""
    got, wanted, parts = OPERATIONS[name](place, dtype)
    error = (exact(got) - wanted).double()
    size = float(wanted.double().norm()) or 1.0
    relative = float(error.norm()) / size if bool(torch.isfinite(error).all()) else float("1e300")
    fine = relative <= bound(dtype, place.world, "reduce" in name)
    shares = {} if fine else {rank: weight(error, part.double()) for rank, part in enumerate(parts)}
    odd = {rank: share for rank, share in shares.items() if abs(share) > NOTED}
    return {"fine": fine, "error": relative, "odd": odd}


def weight(error: Tensor, part: Tensor) -> float:
    """How many times a part is in the answer beyond what it should be: -1, it is missing."""
    size = float(part.square().sum())
    share = float((error * part).sum()) / size if size else 0.0
    return share if math.isfinite(share) else 0.0


def look(rounds: Rounds, low: torch.dtype) -> list[Line]:
    """Every operation in integers, fp32, bf16, and the run's dtype `low`."""
    if rounds.place.world == 1 or rounds.apart:
        why = rounds.apart or "there is one rank"
        return [unseen("sums", why)] if rounds.first else []
    dtypes = list(dict.fromkeys((torch.int32, torch.float32, torch.bfloat16, low)))
    worst: dict[str, float] = {}
    wrong: list[Line] = []
    for dtype, name in itertools.product(dtypes, OPERATIONS):
        if rounds.apart or rounds.over:
            break
        answers = rounds.ask(partial(compare, rounds.place, name, dtype), LIMIT, together=True)
        if rounds.first:
            short = str(dtype).removeprefix("torch.")
            wrong += faults(f"{name} of {short}", answers)
            worst[f"{name} {short}"] = max((a.said["error"] for a in answers if a.said), default=0.0)
    if not rounds.first:
        return []
    if wrong:
        return wrong[:SHOWN]
    if rounds.over and len(worst) < len(dtypes) * len(OPERATIONS):
        return [unseen("sums", "the time was over before they were through")]
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    text = f"{', '.join(OPERATIONS)} in {names}: right on all {rounds.place.world} ranks"
    return [good("sums", text, errors=worst)]


def faults(name: str, answers: Iterable[Answer]) -> list[Line]:
    """What is wrong with one operation, with the ranks that are to blame."""
    told = [*answers]
    found = trouble("sums", told)
    lines = [bad("sums", f"{name}: {line.text}", DO) for line in found]
    off = [answer for answer in told if answer.said and not answer.said["fine"]]
    if off:
        worst = max(answer.said["error"] for answer in off)
        text = (
            f"{name}: wrong on {named([answer.rank for answer in off])}, off by up to {worst:.2g} of its size"
        )
        blamed = {int(rank): share for answer in off for rank, share in answer.said["odd"].items()}
        for rank, share in sorted(blamed.items()):
            text += f"; rank {rank}'s numbers are in it {1 + share:.2g} times"
        lines.append(bad("sums", text, DO))
    return lines


DO = "do not train on these ranks: leave out the machine of the rank that is named, and test it"
