"""What the doctor says in one process: known-bad cells, verdicts; no check hangs or ends the others."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.doctor import company, disks, hardware, machine, parity, rounds, sums, versions
from sfumato.doctor.lines import Line, Verdict, bad, good, show, unseen, warning
from sfumato.engine import cells
from sfumato.engine.ranks import Ranks
from sfumato.errors import UserError
from tests.engine import toys
from tests.house.test_rooms import ROOT

ALONE = Ranks(0, 1, torch.device("cpu"))


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    assert {name: pinned()[name] for name in versions.TESTED} == versions.TESTED


def test_versions_have_verdicts() -> None:
    tested = {"python": "3.11.7", **versions.TESTED}
    assert versions.lines(tested)[0].verdict is Verdict.GOOD
    other = versions.lines({**tested, "torch": "2.14.0"})[0]
    assert other.verdict is Verdict.WARNING and "torch 2.14.0 for 2.13.0" in other.text
    old = versions.lines({**tested, "deepspeed": "0.18.4"})[0]
    assert old.verdict is Verdict.BAD and "deepspeed 0.18.4 (from 0.19.8)" in old.text
    without = {name: version for name, version in tested.items() if name not in ("peft", "numpy")}
    assert versions.lines(without)[0].text == "numpy not installed"


def issues(version: str, world: int = 2, accelerator: str = "gpu", **changes: Any) -> list[str]:
    config = toys.config(micro_batch_size=2, **changes)
    return [cell.issue.split()[-1] for cell in cells.found(config, world, accelerator, version)]


OVERLAP = {"engine__deepspeed": {"zero_optimization": {"overlap_comm": True}}}
OFFLOAD = {"engine__deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}


@pytest.mark.parametrize(
    ("issue", "version", "changes", "better", "other"),
    [
        ("7718", "0.17.6", {"engine__zero_stage": 2}, "0.18.3", {"engine__zero_stage": 3}),
        ("8224", "0.19.3", {"engine__zero_stage": 2, "engine__precision": "bf16"}, "0.18.2", {}),
        ("7965", "0.18.9", {"engine__zero_stage": 2, **OVERLAP}, "0.19.0", {"engine__zero_stage": 2}),
        ("7985", "0.19.0", {"engine__precision": "bf16"}, "0.19.8", {"engine__precision": "fp32"}),
        ("7981", "0.19.0", OFFLOAD, "0.19.8", {}),
    ],
)
def test_a_cell_holds_for_its_versions_and_settings_alone(
    issue: str, version: str, changes: dict[str, Any], better: str, other: dict[str, Any]
) -> None:
    assert issue in issues(version, **changes)
    assert issue not in issues(better, **changes)
    assert issue not in issues(version, **other)


def test_every_stage_of_the_tested_version_is_outside() -> None:
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            assert issues("0.19.8", engine__zero_stage=stage, engine__precision=precision) == []
            assert issues("0.19.7", engine__zero_stage=stage, engine__precision=precision) != []


def test_check_refuses_a_known_bad_cell() -> None:
    keys = {"zero_optimization": {"zero_quantized_weights": True}}
    config = toys.config(micro_batch_size=2, engine__zero_stage=3, engine__deepspeed=keys)
    with pytest.raises(UserError, match="no kernels on CPUs"):
        cells.check_cells(config, 2, "cpu")
    cells.check_cells(config, 2, "gpu")


def shown(line: Line) -> list[str]:
    file = io.StringIO()
    show(line, file)
    return file.getvalue().splitlines()


def test_lines_read_well_in_80_columns() -> None:
    long = "some words about what was found " * 8
    for line in (good("a name", long), bad("clocks", long, long), unseen("sums", "there is one rank")):
        rows = shown(line)
        assert all(len(row) <= 80 for row in rows), rows
    assert shown(warning("disk", "full", "make room"))[1].strip() == "-> make room"
    assert shown(unseen("sums", "there is one rank"))[0].split("not")[1] == " looked at: there is one rank"
    assert Line.of(json.loads(json.dumps(bad("x", "y", "z", n=1).plain()))) == bad("x", "y", "z", n=1)


def test_no_check_hangs_or_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SECOND", 8.0)
    asked = rounds.Rounds(ALONE, None, time.monotonic() + 60)
    began = time.monotonic()
    late = rounds.trouble("slow", asked.ask(lambda: len(machine.second()), 1.0))
    assert time.monotonic() - began < 5
    assert late[0].verdict is Verdict.BAD and "still in second of machine.py" in late[0].text
    assert asked.stuck and not asked.apart
    crashed = rounds.trouble("odd", asked.ask(lambda: 1 / 0, 1.0))
    assert "ZeroDivisionError: division by zero" in crashed[0].text and "\n" not in crashed[0].text

    def refuses() -> None:
        raise UserError("a thing", "another", "do this")

    assert rounds.trouble("user", asked.ask(refuses, 1.0))[0].do == "do this"
    assert asked.ask(lambda: {"a": 1}, 1.0)[0].said == {"a": 1}
    asked.ask(lambda: 1 / 0, 1.0, together=True)
    assert asked.apart == "rank 0 did not come through a check before"
    asked.until = time.monotonic()
    asked.ask(lambda: 1, 1.0)
    assert asked.over


def test_a_disk_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    line = disks.line(["output"], tmp_path)
    assert line.figures["locks"] == {"lockf": "held", "flock": "held"} and line.figures["rename"]
    assert line.figures["speed"] > 0 and not [*tmp_path.iterdir()]
    assert disks.line(["output"], Path("/proc")).verdict is Verdict.BAD


def test_a_lock_that_does_not_hold_is_seen(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    done = subprocess.run(
        [sys.executable, "-S", "-c", disks.ASK, str(tmp_path / "lock")], capture_output=True, text=True
    )
    assert done.stdout.split() == ["free", "free"]


def test_the_machine_has_its_lines() -> None:
    names = [line.name for line in machine.lines(toys.config(), 1)]
    assert names == [
        "memory",
        "shared mem",
        "open files",
        "clock",
        "other work",
        "swap",
        "cores",
        "allocator",
    ]
    crowded = machine.cores(10**4)
    assert crowded.verdict is Verdict.WARNING and "OMP_NUM_THREADS = 1" in crowded.do


@pytest.mark.parametrize(
    ("said", "verdict", "word"),
    [
        ("0, 41, 0x0000000000000001\n0, 39, 0x0000000000000004", Verdict.GOOD, "41, 39 degrees"),
        ("0, 41, 0x0000000000000001\n2, 39, 0x0000000000000000", Verdict.BAD, "GPU 1: 2"),
        ("[N/A], 91, 0x0000000000000040", Verdict.WARNING, "slowed down: GPU 0"),
    ],
)
def test_a_gpus_health_is_judged(said: str, verdict: Verdict, word: str) -> None:
    line = hardware.judged_health(said)
    assert line.verdict is verdict and word in line.text


def fact(**changes: Any) -> dict[str, Any]:
    plain = {
        "host": "a",
        "device": "gpu:0",
        "memory": 80 * 10**9,
        "python": "3.11",
        "code": "c",
        "config": "d",
    }
    return {**plain, "versions": {"torch": "2.13.0"}, "shown": {}, **changes}


def test_ranks_that_are_not_alike_are_named() -> None:
    told = {0: fact(), 1: fact(device="gpu:1"), 2: fact(device="gpu:2", versions={"torch": "2.12.0"})}
    assert company.present(told)[0].verdict is Verdict.GOOD
    line = company.alike(told, None)[0]
    assert line.verdict is Verdict.BAD and "rank 2" in line.text and "torch: 2.12.0, 2.13.0" in line.text
    same = company.alike({0: fact(), 1: fact()}, None)[0]
    assert same.verdict is Verdict.GOOD
    shared = company.present({0: fact(), 1: fact()})[0]
    assert shared.verdict is Verdict.BAD and "ranks 0, 1 share gpu:0" in shared.text
    uneven = company.present({0: fact(), 1: fact(device="gpu:1"), 2: fact(host="b")})[0]
    assert uneven.verdict is Verdict.WARNING


def test_a_clock_that_is_off_is_named() -> None:
    def answers(off: float) -> list[rounds.Answer]:
        return [rounds.Answer(rank, [10.0 + off * rank, 20.0 + off * rank]) for rank in range(2)]

    assert company.told_clocks(answers(0.01)).verdict is Verdict.GOOD
    line = company.told_clocks(answers(7.0))
    assert line.verdict is Verdict.WARNING and "that of rank 1 is +7.0 s off" in line.text


def test_the_share_of_a_rank_in_a_wrong_sum_is_found() -> None:
    parts = [sums.exact(sums.given(rank, 4096, torch.float32)) for rank in range(4)]
    whole = sums.summed(parts)
    lost = whole - parts[2] - whole
    shares = [sums.weight(lost, part) for part in parts]
    assert shares[2] == pytest.approx(-1) and all(abs(shares[rank]) < 0.1 for rank in (0, 1, 3))
    assert sums.bound(torch.bfloat16, 2, True) < 0.01 and sums.bound(torch.int32, 2, True) == 0


def distances(factor: float, noise: float = 0.0) -> dict[str, Any]:
    gap = (factor - 1) ** 2 + noise**2
    return {"gap": gap, "size": 1.0, "dot": factor, "own": factor**2 + noise**2, "worst": "conv_in.weight"}


def test_a_gradient_has_its_verdict() -> None:
    config = toys.config(micro_batch_size=2)

    def line(same: dict[str, Any], exact: dict[str, Any], **changes: Any) -> Line:
        asked = toys.config(micro_batch_size=2, **changes) if changes else config
        return parity.gradient(asked, [{"same": same, "exact": exact, "rounding": 0.0}], "what")

    right = distances(1.0, 1e-7)
    assert line(right, right).verdict is Verdict.GOOD
    double = line(distances(2.0), distances(2.0))
    assert double.verdict is Verdict.BAD and "2 times as long" in double.text
    assert "most in conv_in.weight" in line(distances(1.0, 0.7), right).text
    kernel = line(distances(1.0, 5e-3), distances(1.0, 0.48), engine__precision="bf16")
    assert kernel.verdict is Verdict.BAD and "a kernel is wrong" in kernel.text
