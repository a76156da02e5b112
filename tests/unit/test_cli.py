"""What a person at the shell sees: exit codes, messages, help."""

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfumato import __main__, cli, config
from sfumato.errors import UserError

ROOT = Path(__file__).parents[2]


def sfumato(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sfumato", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_help_is_quick_and_names_the_verbs() -> None:
    start = time.process_time()
    done = sfumato("--help")
    assert done.returncode == 0
    for verb in ("train", "check", "sample", "export", "demo", "tiny", "presets"):
        assert f"    {verb} " in done.stdout
    assert time.process_time() - start < 5


def test_presets_are_listed_with_their_sentences() -> None:
    done = sfumato("presets")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == len(list((ROOT / "sfumato" / "presets").glob("*.toml")))
    assert "SDXL" in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "sdxl-train-bf1"], 'did you mean "sdxl-train-bf16"?'),
        (["train", "sdxl-train-bf16", "data.resolutoin=3"], "did you mean data.resolution?"),
        (["train", "sdxl-train-bf16", "--gpus", "2", "stps=3", "x.y=1"], "unknown key stps"),
        (["train", "sd15-full", "data.source=x", "name=my run"], "it names a folder: letters"),
        (["check", "sdxl-train-bf16", "optimizer.lr=fast"], "optimizer.lr = 'fast'"),
        (
            ["check", "sdxl-train-bf16", "optimizer.lr=true"],
            "optimizer.lr = 'true': Input should be a valid number",
        ),
        (["check", "sdxl-train-bf16", "steps=true"], "steps = 'true'"),
        (["check", "sdxl-train-bf16", "data.views=true"], "data.views = 'true'"),
        (["check", "sdxl-train-bf16", "data.resolution=[64, true]"], ".1 = 'true'"),
        (["check", "sdxl-train-bf16", "engine.zero_stage=true"], "engine.zero_stage = 'true'"),
        # What bash makes of {0,1} without quotes.
        (
            ["check", "sdxl-train-bf16", "data.source=0.tar", "data.source=1.tar"],
            "they set data.source twice",
        ),
        (["train", "sdxl-train-bf16", 'preview.prompts=["caf\udce9"]'], "not valid Unicode text"),
        (["plan", "sdxl-train-bf16", "--memory", "80", "--json", "/proc/x.json"], "/proc takes no file"),
        (["sample", "none", "p", "--out", __file__, "--gpus", "2"], f"{__file__} is no folder"),
    ],
)
def test_a_users_mistake(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "sdxl-train-bf16", "--optimizer.lr=1"], "write settings without dashes: optimizer.lr=1"),
        (["train", "sdxl-train-bf16", "--gpus", "0"], "less than 1"),
        (["train"], "required: config"),
        (["sample", "folder", "a prompt", "--what"], "unknown argument --what"),
        (["trian"], "invalid choice"),
    ],
)
def test_a_command_line_that_makes_no_sense(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_an_option() -> None:
    arguments = cli.parse(["train", "a.toml", "x=1", "--gpus", "2", "y=2"])
    assert arguments.overrides == ["x=1", "y=2"]
    assert arguments.gpus == 2


@pytest.mark.parametrize(
    ("table", "setting", "found"),
    [
        ("validation=true", "validation.samples=4", lambda settings: settings.validation.samples == 4),
        ("data.buckets=true", "data.buckets.step=32", lambda settings: settings.data.buckets.step == 32),
        ("method=lora", "method.rank=4", lambda settings: settings.method.rank == 4),
        ("validation.every=9", "validation.samples=4", lambda settings: settings.validation.samples == 4),
    ],
)
def test_a_table_and_what_is_in_it_go_in_any_order(
    table: str, setting: str, found: Callable[[Any], bool], tmp_path: Path
) -> None:
    file = tmp_path / "a.toml"
    said = ("steps = 1", "batch_size = 1", 'model.weights = "w"', 'data.source = "s"')
    text = "\n".join((*said, "data.buckets = true", "validation = true"))
    file.write_text(text, encoding="utf-8-sig")  # as some editors write it
    for words in ([table, setting], [setting, table], *([[setting]] * (table != "method=lora"))):
        assert found(config.load(file, words)), words


def test_gpus_inside_a_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "sdxl-train-bf16", "--gpus", "2"]) == 2
    assert "leave --gpus out" in capsys.readouterr().err


def test_exit_codes() -> None:
    def mistake() -> int:
        raise UserError("a", "b", "c")

    def defect() -> int:
        raise RuntimeError("ours")

    def stop() -> int:
        raise KeyboardInterrupt

    assert (cli.guarded(lambda: 0), cli.guarded(mistake), cli.guarded(stop)) == (0, 2, 130)
    with pytest.raises(RuntimeError, match="ours"):
        cli.guarded(defect)


def test_a_toy_takes_no_folder_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    weights = tmp_path / "mine" / "model_index.json"
    weights.write_text("of months")
    for folder, found in (
        (tmp_path / "mine", "something is there"),
        (weights, f"{weights} is not a folder"),
        (weights / "a" / "toy", f"{weights} is not a folder"),
    ):
        assert cli.main(["tiny", "sd", str(folder)]) == 2
        assert found in capsys.readouterr().err
    assert [*tmp_path.rglob("*")] == [tmp_path / "mine", weights] and weights.read_text() == "of months"
    for folder in (tmp_path / "new" / "toy", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert cli.main(["tiny", "sd", str(folder)]) == 0
        assert (folder / "model_index.json").is_file()


def test_an_interrupt_while_modules_are_imported(tmp_path: Path) -> None:
    """It comes before there is anything of ours that could catch it, but for the first few lines."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types\n"
        "class Interrupted(types.ModuleType):\n"
        "    def __getattr__(self, name):\n"
        "        exec('raise KeyboardInterrupt')  # as within a dataclass\n"
        "sys.modules['sfumato.cli'] = Interrupted('sfumato.cli')\n"
    )
    env, words = os.environ | {"PYTHONPATH": str(tmp_path)}, [sys.executable, "-m", "sfumato", "presets"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_both_ways_to_start_are_one() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"sfumato": f"{__main__.__name__}:{__main__.main.__name__}"}
    code = "import sys, sfumato.__main__; print(*(name for name in sys.modules if 'sfumato.' in name))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["sfumato.__main__"], "what is imported first can be interrupted"


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m sfumato presets | true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
