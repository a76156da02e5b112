"""`bench gpu`: rows of each kind for real, at toy size on the CPU; what is left out is said."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from sfumato.bench import gpu
from sfumato.bench.gpu import rows
from sfumato.bench.gpu.ceilings import share
from sfumato.errors import UserError
from sfumato.planner.devices import find
from tests.engine.ranks import run_ranks

KINDS = ("ours", "example", "encode", "draw")


def toys(file: Path) -> dict[str, Any]:
    """One row of each kind, in a process of its own; and one that fails."""
    gpu.ROWS = tuple(next(row for row in rows.ROWS if row.what == kind) for kind in KINDS)
    gpu.ROWS += (rows.Row("a broken one", "ours", "sdxl-lora", ("data.cache=both", "method.rank=4"), (3,)),)
    gpu.ROWS += tuple(row for row in rows.ROWS if "compiled" in row.name)
    gpu.config_of = spoilt
    return gpu.run(True, file)


def spoilt(row: rows.Row, batch: int, toy: Path | None) -> Any:
    if row.name == "a broken one":
        raise RuntimeError("out of memory: no more paint")
    return rows.config_of(row, batch, toy)


def test_every_kind_of_row_runs_and_a_broken_one_stops_none(tmp_path: Path) -> None:
    found = run_ranks(toys, 1, tmp_path / "found.json", init=False)[0]
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["name"] == rows.ROWS[0].name
    *good, bad, compiled = found["rows"]
    assert [row["what"] for row in good] == [*KINDS]
    for row in good:
        assert row["low"] <= row["high"] and 0 < row["per_second"] and row["flops"] > 1e6
        measured = row["flops"] * row["per_second"] / found["ceilings"]["matmul"]
        assert row["mfu"]["measured"] == measured and row["mfu"]["datasheet"] is None
    assert bad["skipped"] == "batch 3: RuntimeError: out of memory: no more paint"
    assert "wrong gradients in bf16" in compiled["skipped"], (
        "not taken on a CPU, and not in its message's form"
    )
    assert isinstance(good[0]["attention"], dict), "our rows train with the fastest kernels"
    native = [row for row in found["ceilings"]["attention"] if row["backend"] == "native"]
    assert len(native) == 3 and all(row["both"] > 0 for row in native)


def test_what_the_time_does_not_hold_is_left_out() -> None:
    told = gpu.taken(rows.ROWS[0], None, None, time.monotonic() + 50, {})  # type: ignore[arg-type]
    assert told["skipped"].startswith(("50 s are left", "49 s are left"))
    assert sum(row.seconds + row.takes for row in rows.ROWS) < gpu.BUDGET


def test_every_row_is_a_run_of_its_preset() -> None:
    for row in rows.ROWS:
        for batch in row.batches:
            config = rows.config_of(row, batch, None)
            assert config.batch_size == config.micro_batch_size == batch
            assert config.engine.precision == "bf16" and not config.ema.enabled


def test_both_peaks_tell_a_share() -> None:
    peak = find("H200").half * 1e12
    assert share(0.55 * peak, peak) == pytest.approx(0.55)
    assert share(1.0, None) is None


def test_without_an_accelerator_the_toys_are_offered() -> None:
    with pytest.raises(UserError, match="try it with --toy"):
        gpu.run(False, None)
