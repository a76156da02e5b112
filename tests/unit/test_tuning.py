"""A rank's environment: the run's own over the shell's, and what is fast where the user said nothing."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.accelerator import real_accelerator

from sfumato import device
from sfumato.config import parse
from sfumato.tuning import DONE, Mark, given, has_accelerator, has_bf16, importing, missing, report, unneeded
from sfumato.variables import ALLOCATOR

ROOT = Path(__file__).parents[2]
RUN = {"steps": 1, "batch_size": 1, "model": {"weights": "w"}, "data": {"source": "s"}}
CPU = {"DS_ACCELERATOR": "cpu"}


def test_cpu_ranks_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert missing(CPU, 2) == ALLOCATOR | {"OMP_NUM_THREADS": str(max(1, cores // 2))}
    assert missing(CPU, 1) == ALLOCATOR


def test_a_gpu_rank_needs_no_allocator() -> None:
    assert missing({"DS_ACCELERATOR": "cuda"}, 1) == {}


def test_the_users_own_stay() -> None:
    user = CPU | {"OMP_NUM_THREADS": "3", "MALLOC_TOP_PAD_": "1"}
    assert not missing(user, 2).keys() & user.keys()


def test_the_config_wins_over_the_shell_and_both_over_us() -> None:
    shell = CPU | {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "3", "PATH": "/bin"}
    whole = given(shell, 2, {"NCCL_DEBUG": "INFO", "MALLOC_TOP_PAD_": "7"})
    assert whole["NCCL_DEBUG"] == "INFO" and whole["MALLOC_TOP_PAD_"] == "7"
    assert whole["OMP_NUM_THREADS"] == "3" and whole["PATH"] == "/bin"
    assert whole["MALLOC_TRIM_THRESHOLD_"] == ALLOCATOR["MALLOC_TRIM_THRESHOLD_"]
    # A device that the config names decides as one of the shell's does.
    assert not given({}, 1, {"DS_ACCELERATOR": "cuda"}).keys() & ALLOCATOR.keys()
    assert given({"DS_ACCELERATOR": "cuda"}, 1, CPU).keys() >= ALLOCATOR.keys()


def test_the_report_tells_who_set_what() -> None:
    shell = CPU | {"OMP_NUM_THREADS": "3"}
    found = {each.name: each for each in report(given(shell, 1, {"NCCL_DEBUG": "INFO", "MY_OWN": "x"}))}
    assert {name: each.who for name, each in found.items()} == {
        "DS_ACCELERATOR": "you",
        "OMP_NUM_THREADS": "you",
        "NCCL_DEBUG": "config",
        "MY_OWN": "config",
    } | dict.fromkeys(ALLOCATOR, "sfumato")
    assert found["MALLOC_TOP_PAD_"].value == ALLOCATOR["MALLOC_TOP_PAD_"] and found["NCCL_DEBUG"].why
    bare = {each.name: (each.value, each.who) for each in report({})}
    assert bare == dict.fromkeys((*ALLOCATOR, "OMP_NUM_THREADS"), (None, "nobody"))
    # A rank that starts others hands on who set what.
    again = given(given(shell, 1), 2)
    assert Mark.read(again).ours == [*ALLOCATOR]


def test_device_files(tmp_path: Path) -> None:
    assert not has_accelerator({}, tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert has_accelerator({}, tmp_path)
    assert not has_accelerator(CPU, tmp_path)


def begun(code: str, **environment: str) -> list[str]:
    """The lines that a program says which begins anew if it must."""
    kept = {name: value for name, value in os.environ.items() if name not in (*ALLOCATOR, DONE)}
    out = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            f"import os, sys; print('begun', os.getpid(), flush=True); {code}",
        ]
        + ["a b", "c"],
        cwd=ROOT,
        env=kept | CPU | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.splitlines()


@pytest.mark.parametrize(
    ("said", "known"),
    [("flags : fma amx_bf16 amx_tile", True), ("flags : avx512_bf16", True), ("Features : fp bf16 sve", True),
     ("flags : fma avx512f avx512_fp16", False), (None, True)],
)  # fmt: skip
def test_which_cpus_know_bf16(tmp_path: Path, said: str | None, known: bool) -> None:
    if said is not None:
        (tmp_path / "cpuinfo").write_text(f"model name : A CPU\n{said}\nbugs :\n")
    assert has_bf16(tmp_path / "cpuinfo") is known


def test_a_process_begins_anew_once_with_the_same_arguments_and_number() -> None:
    first, second, told = begun(
        "from sfumato import tuning; tuning.restart(); print(os.environ['MALLOC_TOP_PAD_'], sys.argv[1:])"
    )
    assert first == second and first.startswith("begun")
    assert told == "268435456 ['a b', 'c']"


def test_a_process_begins_anew_for_the_configs_variables_and_never_in_a_loop() -> None:
    """Also where it was tuned before, and where something takes a variable away at every start."""
    own = "own = {'NCCL_DEBUG': 'INFO', 'GONE': '1'}; os.environ.pop('GONE', None); "
    lines = begun(
        own + "from sfumato import tuning; tuning.restart(own); print(os.environ['NCCL_DEBUG'])",
        NCCL_DEBUG="WARN",
        **{DONE: str(Mark())},
    )
    assert [line.split()[0] for line in lines] == ["begun", "begun", "INFO"] and lines[0] == lines[1]


def test_nothing_begins_anew_where_nothing_is_missing() -> None:
    lines = begun(
        "from sfumato import tuning; tuning.restart({'A': '1'}); print('torch' in sys.modules)",
        A="1",
        DS_ACCELERATOR="cuda",
    )
    assert [line.split()[0] for line in lines] == ["begun", "False"]


def test_only_a_packed_base_needs_its_package() -> None:
    lora = parse({**RUN, "method": {"kind": "lora", "base_bits": 4}}).method
    assert unneeded(lora) == () and unneeded(parse(RUN).method) == unneeded(None) == ("bitsandbytes",)


def test_imports_go_without_the_collector_and_what_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("unneeded", "needed"):
        (tmp_path / f"{name}.py").write_text("import gc; asleep = not gc.isenabled()")
    monkeypatch.syspath_prepend(tmp_path)
    with importing(["unneeded", "os"]):
        import needed
    assert needed.asleep and gc.isenabled() and gc.get_freeze_count() > 0
    assert sys.modules["os"] is os, "what is there already stays"
    with pytest.raises(ModuleNotFoundError), importing():
        import unneeded  # noqa: F401
    assert gc.isenabled(), "an import that fails wakes it too"
    gc.unfreeze()
    for name in ("unneeded", "needed"):
        monkeypatch.delitem(sys.modules, name)


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DeepSpeed raises in the middle of its import; another error is not taken for it."""
    monkeypatch.setattr(real_accelerator, "ds_accelerator", None)
    for name, found in (("npu", "torch_npu"), ("toaster", "not supported")):
        monkeypatch.setenv("DS_ACCELERATOR", name)
        with pytest.raises(ValueError) as raised:
            real_accelerator.get_accelerator()
        told = device.not_there(raised.value)
        assert told is not None and told.asked == f"DS_ACCELERATOR = {name}" and found in told.found
    with pytest.raises(ValueError) as raised:
        int("one")
    assert device.not_there(raised.value) is None
    monkeypatch.delenv("DS_ACCELERATOR")
    assert device.not_there(raised.value) is None
