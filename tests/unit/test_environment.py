"""The table [environment]: what may stand there, that ranks get it, and what a run keeps of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sfumato import changes, config
from sfumato.config import parse
from sfumato.config.environment import LOGIN
from sfumato.errors import UserError
from sfumato.report import public
from sfumato.variables import groups, known, page, recorded

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"steps": 1, "batch_size": 1, "model": {"weights": "w"}, "data": {"source": "s"}}


def read(table: Any) -> dict[str, str]:
    return parse({**SMALL, "environment": table}).environment


def test_texts_and_numbers_become_texts() -> None:
    assert read({"NCCL_DEBUG": "INFO", "HCCL_CONNECT_TIMEOUT": 1200, "_x1": 0.5, "EMPTY": ""}) == {
        "NCCL_DEBUG": "INFO",
        "HCCL_CONNECT_TIMEOUT": "1200",
        "_x1": "0.5",
        "EMPTY": "",
    }
    assert parse(SMALL).environment == {}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("A", True, 'write "1" or "true", in quotes'),
        ("A", False, 'write "0" or "false"'),
        ("A", ["b"], "one text"),
        ("A", {"b": "c"}, "one text"),
        ("A", "b\0c", "zero byte"),
        ("1A", "b", "begin with no digit"),
        ("A=B", "b", "letters, digits and _"),
        ("", "b", "letters, digits and _"),
        ("RANK", 0, "the launcher's"),
        ("WORLD_SIZE", 8, "the launcher's"),
        ("SLURM_PROCID", 0, "the launcher's"),
        ("SFUMATO_TUNED", "", "the launcher's"),
        ("MASTER_ADDR", "node1", "--master"),
        ("HF_TOKEN", "hf_x", "a secret"),
        ("WANDB_API_KEY", "x", "a secret"),
        ("AWS_SECRET_ACCESS_KEY", "x", "a secret"),
        ("HTTP_PROXY", "http://me:hushed@host", "a login"),
    ],
)
def test_what_may_not_stand_there_is_refused_with_what_to_do(name: str, value: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        read({name: value})
    assert words in error.value.found and f"environment.{name}" in error.value.found
    assert "hf_x" not in str(error.value) and "hushed" not in str(error.value)


def test_it_is_set_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('steps = 1\nbatch_size = 1\nmodel.weights = "w"\ndata.source = "s"\n')
    found = config.load(file, ["environment.NCCL_DEBUG=INFO", "environment.NCCL_IB_DISABLE=1"])
    assert found.environment == {"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"}


def test_it_may_change_between_two_starts() -> None:
    assert changes.free("environment.NCCL_DEBUG", parse(SMALL))


def test_a_published_model_does_not_tell_of_it() -> None:
    told = dict(public.settings(parse({**SMALL, "environment": {"LD_PRELOAD": "/home/me/lib.so"}})))
    assert told["steps"] == 1 and not [name for name in told if name.startswith("environment")]


def test_the_page_is_current() -> None:
    written = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m sfumato.variables > docs/environment.md"


def test_the_table_is_whole() -> None:
    names = [each.name for group in groups() for each in group.variables]
    assert len(names) == len(set(names)) == len(known())
    for each in known().values():
        assert each.default and each.what.endswith("."), each.name
        assert "|" not in each.default + each.what, f"{each.name} would break the page's table"
    # What the newer scripts for Ascend export.
    ascend = {each.name for group in groups() if group.title.startswith("Ascend") for each in group.variables}
    assert ascend >= {
        "HCCL_CONNECT_TIMEOUT",
        "TASK_QUEUE_ENABLE",
        "PYTORCH_NPU_ALLOC_CONF",
        "ACLNN_CACHE_LIMIT",
    }


def test_what_is_kept_of_an_environment() -> None:
    env = {
        "NCCL_DEBUG": "INFO",  # of the page
        "NCCL_NET_GDR_LEVEL": "2",  # of the same library
        "MY_OWN": "x",  # of the config
        "HOME": "/home/me",
        "HF_TOKEN": "hf_secret",
        "HF_API_KEY": "secret",
        "HF_ENDPOINT": "https://me:secret@mirror",
    }
    kept = recorded(env, {"MY_OWN": "x", "HF_TOKEN": "hf_secret"})
    assert kept == {"MY_OWN": "x", "NCCL_DEBUG": "INFO", "NCCL_NET_GDR_LEVEL": "2"}


def check_no_secret(kept: dict[str, str]) -> None:
    assert "secret" not in json.dumps(kept)


def test_a_record_without_an_allow_list_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"HF_TOKEN": "hf_secret", "NCCL_DEBUG": "INFO"}
    check_no_secret(recorded(env, env))
    monkeypatch.setattr("sfumato.config.environment.SECRET", LOGIN)  # finds no secret by its name
    with pytest.raises(AssertionError):
        check_no_secret(recorded(env, env))


def test_each_way_of_starting_gives_it_to_the_ranks(tmp_path: Path) -> None:
    """One process, a rank that torchrun started, and two of our launcher; before torch is imported."""
    program = tmp_path / "program.py"
    program.write_text(
        "import argparse, os, sys\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace as Table\n"
        "from sfumato.launch.become import as_ranks\n"
        "names = 'gpus nodes node_rank master hostfile'.split()\n"
        "asked = dict.fromkeys(names) | {'gpus': int(sys.argv[1]) or None, 'real': True}\n"
        "asked['command'] = [sys.executable, *sys.orig_argv[1:]]\n"
        "own = Table(environment={'NCCL_DEBUG': 'INFO', 'OWN': 'x'}, engine=Table(timeout=60))\n"
        "code = as_ranks(argparse.Namespace(**asked), Path(sys.argv[2]), own)\n"
        "if code is None:\n"
        "    assert 'torch' not in sys.modules\n"
        "    print(os.environ.get('RANK'), os.environ['OWN'], os.environ['NCCL_DEBUG'], flush=True)\n"
        "sys.exit(code or 0)\n"
    )
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for gpus, env, said in ((0, {}, None), (0, torchrun, "1"), (2, {}, "0")):
        logs = tmp_path / f"logs{gpus}{len(env)}"
        out = subprocess.run(
            [sys.executable, program, str(gpus), logs],
            env={**os.environ, "PYTHONPATH": str(ROOT), "NCCL_DEBUG": "WARN", "DS_ACCELERATOR": "cpu", **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert out.returncode == 0, out.stderr
        told = [*logs.glob("rank-1.log")]
        lines = out.stdout.splitlines() or told[0].read_text().splitlines()
        assert f"{said} x INFO" in lines, (lines, out.stderr)
        if gpus:
            assert told[0].read_text() == "1 x INFO\n"
