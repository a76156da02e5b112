"""`bench scaling`: a cell runs on real ranks, and sends what the formula says; one that fails is told."""

from multiprocessing import forkserver

import pytest

from sfumato.bench import scaling
from sfumato.bench.scaling import Cell
from tests.engine.ranks import fork_server
from tests.unit import twins


@pytest.fixture(autouse=True)
def started() -> None:
    """The suite's own server of processes, not a second kind of it for the tests that follow."""
    fork_server()
    forkserver.ensure_running()


def test_a_cell_of_two_ranks_sends_what_the_formula_says() -> None:
    cell = Cell(2, 2)
    config = scaling.settings(twins.twin("sd"), cell, 64, 4)
    told = scaling.measured(config, 64, 2, 2)
    assert [len(rank["wall"]) for rank in told] == [2, 2]
    row = scaling.figures(cell, [told], config, 64)
    assert row["foretold"] > 1e6 and abs(row["sent"] - row["foretold"]) < 3e-3 * row["foretold"]
    assert row["cpu"][0] > sum(min(rank["cpu"]) for rank in told) - 1e-9 > 0
    assert 4e6 < row["memory"][0] < 400e6  # a million numbers and their states, and no library
    found = {"model": "tiny", "parameters": 1e6, "batch": 4, "cells": [row]}
    assert scaling.table(found).row_count == 1


def test_a_rank_that_fails_is_told_with_its_reason() -> None:
    config = scaling.settings(twins.twin("sd") / "missing", Cell(0, 1), 64, 4)
    with pytest.raises(RuntimeError, match=r"rank 0 failed:\n(.*\n)*.*missing"):
        scaling.measured(config, 64, 1, 1)
