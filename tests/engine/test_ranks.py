"""The two-rank helper itself: values, errors, deaths and hangs."""

import os
import time

import pytest
import torch
import torch.distributed.distributed_c10d as c10d

from sfumato.engine.ranks import start
from tests.engine.ranks import RankError, run_ranks


def add_over_ranks(start: int) -> tuple[int, float]:
    rank = torch.distributed.get_rank()
    total = torch.tensor(float(start + rank))
    torch.distributed.all_reduce(total)
    return rank, total.item()


def fail_on_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("rank one does not like this")
    torch.distributed.barrier()


def die_on_one() -> None:
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), 9)
    torch.distributed.barrier()


def wait_for_nobody() -> None:
    if torch.distributed.get_rank() == 0:
        torch.distributed.barrier()
    time.sleep(60)


def test_values_come_in_order_of_rank() -> None:
    assert run_ranks(add_over_ranks, 2, 10) == [(0, 21.0), (1, 21.0)]


def test_an_error_ends_all_at_once() -> None:
    begin = time.monotonic()
    with pytest.raises(RankError, match="rank one does not like this") as caught:
        run_ranks(fail_on_one, 2)
    assert caught.value.rank == 1
    assert isinstance(caught.value.error, ValueError)
    assert time.monotonic() - begin < 20


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankError, match="exit code -9") as caught:
        run_ranks(die_on_one, 2)
    assert caught.value.rank == 1


def limits() -> list[float]:
    """The seconds of a group that was made without any, and of those that NCCL would make."""
    start(1234.0)
    group = torch.distributed.new_group()
    found = group._get_backend(torch.device("cpu")).options._timeout, c10d._get_default_timeout("nccl")
    return [each.total_seconds() for each in found]


def test_groups_that_others_make_have_the_runs_limit() -> None:
    """As DeepSpeed's, through which the gradients go."""
    assert run_ranks(limits, 1, init=False) == [[1234.0, 1234.0]]


def test_a_hang_is_named() -> None:
    with pytest.raises(RankError, match=r"wait_for_nobody hung: ranks \[0, 1\]") as caught:
        run_ranks(wait_for_nobody, 2, timeout=3)
    assert "in barrier" in str(caught.value)
