"""What the doctor says in one process: known-bad cells, verdicts; no check hangs or ends the others."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from sfumato import device
from sfumato.doctor import (
    company,
    disks,
    gradient,
    hardware,
    machine,
    nvme,
    parity,
    rounds,
    sums,
    twin,
    versions,
)
from sfumato.doctor.lines import Line, Verdict, bad, good, show, unseen, warning
from sfumato.engine import cells, reader
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
    config = toys.config(**{"micro_batch_size": 1, **changes})
    return [cell.issue for cell in cells.found(config, world, accelerator, version)]


def zero(**keys: Any) -> dict[str, Any]:
    return {"engine__deepspeed": {"zero_optimization": keys}}


FIRST, SECOND, THIRD = ({"engine__zero_stage": stage} for stage in (1, 2, 3))
BF16: dict[str, Any] = {"engine__precision": "bf16"}
FP32: dict[str, Any] = {"engine__precision": "fp32"}
MOVED = {"engine__offload_optimizer": "cpu"}
HALF, WHOLE = {"micro_batch_size": 2}, {"micro_batch_size": 4}
"""Two micro-batches a step on two ranks, and one; four where nothing is said."""
ONE_RANK, ON_CPUS = {"world": 1}, {"accelerator": "cpu"}
OVERLAP = SECOND | zero(overlap_comm=True)
COMPILED = OVERLAP | {"engine__compile": True}
PIECES = SECOND | ON_CPUS | zero(contiguous_gradients=False)
AUDITED: list[tuple[str, str, str, str, dict[str, Any], list[dict[str, Any]]]] = [
    ("7718", "0.17.5", "0.17.6", "0.18.3", SECOND, [FIRST, WHOLE, MOVED]),
    ("8224", "0.18.2", "0.18.3", "0.19.8", SECOND | BF16, [FIRST, FP32, MOVED, ONE_RANK]),
    ("7965", "", "0.1.0", "0.19.0", OVERLAP, [zero(overlap_comm=False), THIRD, ON_CPUS]),
    ("8061", "", "0.1.0", "0.19.3", COMPILED, [{"engine__compile": False}, ON_CPUS]),
    ("7985", "0.18.2", "0.18.3", "0.19.0", FIRST | BF16, [SECOND, WHOLE, FP32, MOVED, ONE_RANK]),
    (
        "7967",
        "0.15.1",
        "0.15.2",
        "0.19.0",
        SECOND | MOVED,
        [FIRST, HALF, {"engine__offload_optimizer": "none"}],
    ),
    ("8382", "", "0.9.0", "0.19.8", PIECES, [zero(), THIRD, MOVED, ONE_RANK, {"accelerator": "gpu"}]),
]
"""An issue's number; the last version before it, the first with it, the first without; settings in it, and
what of them leads out of it."""


@pytest.mark.parametrize(("issue", "before", "first", "good", "bad", "others"), AUDITED)
def test_a_cell_holds_for_its_versions_and_settings_alone(
    issue: str, before: str, first: str, good: str, bad: dict[str, Any], others: list[dict[str, Any]]
) -> None:
    def told(version: str, **changes: Any) -> bool:
        return any(f" {issue}" in found for found in issues(version, **bad | changes))

    # The last broken release before the one that is right.
    *major, minor = map(int, good.split("."))
    last = ".".join(map(str, [*major, minor - 1])) if minor else f"0.{major[1] - 1}.9"
    assert told(first) and told(last) and told(f"{last}+cu128")
    assert not told(good) and not told(f"{good}.dev0")
    assert not before or not told(before)
    for other in others:
        assert not told(last, **other), other


def test_every_cell_with_versions_is_audited() -> None:
    dated = [cell.issue for cell in cells.CELLS if cell.good and cell.issue.startswith("DeepSpeed")]
    assert len(dated) == len(AUDITED)
    assert all(any(f" {row[0]}" in issue for row in AUDITED) for issue in dated)


@pytest.mark.parametrize(
    ("keys", "words", "harmless"),
    [
        ({"gradient_allreduce_op": "sum"}, "as many times too long", {"gradient_allreduce_op": "mean"}),
        ({"managed_gradient_accumulation": False}, "a whole batch", {"managed_gradient_accumulation": True}),
        ({"zero_optimization": {"compute_grad_norm": False}}, "no gradient norm", {}),
        ({"compile": {"deepcompile": True}}, "does nothing by itself", {}),
    ],
)
def test_keys_under_which_the_gradient_is_not_the_batchs_are_refused(
    keys: dict[str, Any], words: str, harmless: dict[str, Any]
) -> None:
    config = toys.config(micro_batch_size=2, engine__deepspeed=keys)
    assert any(words in cell.what for cell in cells.found(config, 2, "gpu"))
    assert issues("0.19.8", engine__deepspeed=harmless) == []
    if "gradient_allreduce_op" in keys:
        assert not [*cells.found(config, 1, "gpu")]


def test_compiled_blocks_in_bf16_on_cpus_are_known_to_be_wrong() -> None:
    on: dict[str, Any] = {"engine__compile": True}
    assert issues("0.19.8", accelerator="cpu", **on, **BF16) == ["tried with torch 2.13"]
    assert issues("0.19.8", accelerator="cpu", **on) == issues("0.19.8", **on, **BF16) == []


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


def waiting(folder: Path, **changes: Any) -> Any:
    """A LoRA of SD 1.5 whose optimizer waits on a disk."""
    model = {"model__weights": "stable-diffusion-v1-5/stable-diffusion-v1-5", "method__kind": "lora"}
    away = {"engine__offload_optimizer": "nvme", "engine__nvme_path": str(folder), "engine__zero_stage": 3}
    return toys.config(**{"micro_batch_size": 2, "method__rank": 64, **model, **away, **changes})


def test_the_disk_of_an_optimizer_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvme.lines(toys.config(), 1, 1) == []
    if what := reader.lacking():
        pytest.skip(f"no optimizer can wait on a disk here without {what}")
    line = nvme.room(waiting(tmp_path), 1, 1)
    numbers = 25_000_000  # of rank 64: a state of SGD's none, so weights alone, and a checkpoint's copy
    assert line.verdict is Verdict.GOOD and "of each step" in line.text, line
    assert 2 * 4 * numbers * 0.2 < line.figures["needed"] < 2 * 4 * numbers * 2
    assert line.figures["write"] > 0 and line.figures["read"] > 0 and not [*tmp_path.iterdir()]
    monkeypatch.setattr(nvme, "LONG", 0.0)
    slow = nvme.room(waiting(tmp_path), 1, 1)
    assert slow.verdict is Verdict.WARNING and "a faster disk" in slow.do
    unknown = nvme.room(waiting(tmp_path, model__weights="toy"), 1, 1)
    assert unknown.verdict is Verdict.WARNING and "is not known" in unknown.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine__zero_stage": 2}, "at stage 3 only"),
        ({"engine__nvme_path": "/no/such/place"}, "no such folder"),
        ({"engine__nvme_path": "/proc"}, "/proc"),
    ],
)
def test_a_disk_that_cannot_hold_an_optimizer_is_bad(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    line = nvme.room(waiting(tmp_path, model__weights="toy", **changes), 1, 1)
    assert line.verdict is Verdict.BAD and words in line.text and line.do


def test_nothing_is_compiled_for_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert not twin.at_hand(waiting(tmp_path))
    small = twin.shrunk(waiting(tmp_path), 1, tmp_path, tmp_path / "toy")
    assert small.engine.offload_optimizer == "cpu" and small.engine.zero_stage == 3
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = nvme.compiled()
    assert line.verdict is Verdict.BAD and "a compiler" in line.text and "libaio-dev" in line.do
    lock = reader.place_of("async_io") / "lock"
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - 2 * reader.STILL,) * 2)
    assert str(lock) in nvme.compiled().text


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


class Seam:
    """DeepSpeed's accelerator, which knows of this process's memory alone."""

    def is_bf16_supported(self) -> bool:
        return True

    is_fp16_supported = is_bf16_supported

    def total_memory(self) -> int:
        return 80 * 10**9

    available_memory = total_memory


@pytest.mark.parametrize(("asked", "verdict"), [(True, Verdict.WARNING), (False, Verdict.GOOD)])
def test_who_else_holds_memory_is_asked_of_the_device(
    monkeypatch: pytest.MonkeyPatch, asked: bool, verdict: Verdict
) -> None:
    """Where torch has the question for a kind of device; another one's library is imitated here."""
    library = (
        SimpleNamespace(mem_get_info=lambda of: (20 * 10**9, 80 * 10**9)) if asked else SimpleNamespace()
    )
    monkeypatch.setattr(torch, "other", library, raising=False)
    for module in (device, hardware):
        monkeypatch.setattr(module, "accelerator", Seam)
    monkeypatch.setattr(hardware, "kind", lambda: "other")
    monkeypatch.setattr(hardware, "health", list)
    [line] = hardware.lines(None, SimpleNamespace(type="other"))  # type: ignore[arg-type]
    assert line.verdict is verdict
    assert ("20.0 of 80.0 GB free" if asked else "80.0 of 80.0 GB free") in line.text


def test_the_gradient_is_compared_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(*asked: Any) -> dict[str, Any]:
        return {"rounded": torch.backends.cudnn.allow_tf32}

    config = toys.config()
    monkeypatch.setattr(twin, "shrunk", lambda *asked: config)
    monkeypatch.setattr(gradient, "Bench", lambda *asked: None)
    monkeypatch.setattr(gradient, "sides", seen)
    before = torch.backends.cudnn.allow_tf32
    assert before and not gradient.measure(config, ALONE, None)["rounded"]
    assert torch.backends.cudnn.allow_tf32 == before


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


def test_ranks_that_are_not_alike_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {0: fact(), 1: fact(device="gpu:1"), 2: fact(device="gpu:2", versions={"torch": "2.12.0"})}
    assert company.present(told)[0].verdict is Verdict.GOOD
    line = company.alike(told, None)[0]
    assert line.verdict is Verdict.BAD and "rank 2" in line.text and "torch: 2.12.0, 2.13.0" in line.text
    same = company.alike({0: fact(), 1: fact()}, None)[0]
    assert same.verdict is Verdict.GOOD
    edited = company.alike({0: fact(), 1: fact(edited=True)}, None)
    assert edited[0].verdict is Verdict.BAD and "changed while rank 1 ran" in edited[0].text
    monkeypatch.setattr(company, "LOADED", "other files")
    assert company.facts(None)["edited"]
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


def test_other_work_on_the_processors_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four seconds on two cores one, or three, belonged to others."""

    class Times(NamedTuple):
        user: float
        idle: float

    monkeypatch.setattr(machine, "SECOND", 0.0)
    for user, verdict in ((1.0, Verdict.GOOD), (3.0, Verdict.WARNING)):
        times = iter((Times(0.0, 0.0), Times(user, 4.0 - user)))
        monkeypatch.setattr(machine.psutil, "cpu_times", lambda times=times: next(times))
        line = machine.second()[1]
        assert (line.name, line.verdict) == ("other work", verdict)
        assert ("75 % of the processors busy" in line.text) == (verdict is Verdict.WARNING)
