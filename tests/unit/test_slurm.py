"""`sfumato slurm`: the script as it is printed, what real bash makes of it, and what is refused.

srun and scontrol are small stand-ins here, which get and give what the real ones do;
tests/engine/test_slurm_real.py runs the scripts under Slurm itself. SFUMATO_GOLDEN=1 writes those of
tests/unit/slurm anew.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.cli import main
from sfumato.config import load
from sfumato.errors import CONTINUE
from sfumato.slurm.options import duration, spelled
from sfumato.slurm.shell import quote, value, words
from sfumato.slurm.sweep import axis, runs

GOLDEN = Path(__file__).with_name("slurm")
PYTHON = "/opt/venv/bin/python"
CONFIG = """
name = "my-run"
steps = 10
batch_size = 64
[model]
weights = "toy"
[data]
source = "pictures"
"""
SCRIPTS = {
    "one-node": ["my-run.toml", "--gpus", "8"],
    "cluster": [
        *("my-run.toml", "optimizer.lr=1e-5", "--nodes", "4", "--gpus", "8", "--time", "8:00:00"),
        *("--partition", "big", "--account", "art", "--qos", "high", "--mem", "900G", "--gres", "gpu:a100"),
        *("--constraint", "[rack1|rack2]", "--cpus-per-gpu", "12", "--job-name", "a \"b' c\\d"),
        *("--setup", "module load cuda/12.4; module load gcc", "--sbatch", "exclusive"),
        *("--sbatch", "reservation=mine", "--grace", "600", "--restarts", "20", "--fruitless", "2"),
    ],
    "sweep": [
        *("my-run.toml", "--gpus", "4", "--sweep", "optimizer.lr=1e-5,3e-5", "--sweep", "seed=0,1,2"),
        *("--max-running", "2", "--time", "90"),
    ],
    "sample": [
        *("--nodes", "2", "--gpus", "8", "--time", "1:00:00", "--"),
        *("sample", "runs/my-run", "it's a fox", "--seeds", "1", "2", "--out", "my pictures"),
    ],
    "cpus": ["my-run.toml", "--gpus", "2", "--gres", "none", "--output", "slurm-%x-%j.txt"],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a config."""
    (tmp_path / "my-run.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(arguments: Sequence[str], capsys: pytest.CaptureFixture[str], python: str = PYTHON) -> str:
    """What the command prints."""
    assert main(["slurm", "--python", python, *arguments]) == 0
    return capsys.readouterr().out


def refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that prints no script."""
    try:
        code: object = main(["slurm", *arguments])
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    assert code == 2 and not told.out, f"{code}: {told.out}"
    return told.err


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_what_it_was(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(SCRIPTS[name], capsys)
    golden = GOLDEN / f"{name}.sh"
    if os.environ.get("SFUMATO_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert not list(place.glob("runs")), "to print a script makes nothing"


# Words of bash.


NASTY = [
    *(
        "",
        " ",
        "a b",
        "it's",
        '"',
        "\\",
        "$HOME",
        "`id`",
        "$(id)",
        "a\nb",
        "a\r\nb",
        "\t",
        "*",
        "?",
        "[a]",
        "~",
    ),
    *(
        "!x",
        "#x",
        "-n",
        "a;b",
        "a&b",
        "a|b",
        "(a)",
        "{a,b}",
        "<a",
        "größe",
        "日本",
        "\udcff",
        "\x1b1",
        "'\n'",
        "\\\n",
    ),
]


def echoed(texts: Sequence[str]) -> list[str]:
    """What a program gets that bash starts with these words."""
    script = f"printf '%s\\0' {words(texts)}"
    assert "\n" not in script and "\r" not in script, "sbatch refuses it"
    got = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    return [os.fsdecode(part) for part in got.split(b"\0")[:-1]]


def test_nasty_words_reach_a_program_as_they_are() -> None:
    assert echoed(NASTY) == NASTY


LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from(
    ["\udc80", "\udcff", "'", '"', "\\", "\n", "\r", "$", "!", "7"]
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(LETTERS), min_size=1, max_size=40))
def test_any_words_reach_a_program_as_they_are(texts: list[str]) -> None:
    assert echoed(texts) == texts


def test_a_word_that_is_not_quoted_is_caught() -> None:
    broken = subprocess.run(["bash", "-c", "printf '%s\\0' a b"], capture_output=True, check=True).stdout
    assert [os.fsdecode(part) for part in broken.split(b"\0")[:-1]] != ["a b"]
    assert quote("a b") == "'a b'" and quote("a=b") == "a=b"


def test_values_of_sbatch_lines() -> None:
    assert value("gpu:a100") == "gpu:a100"
    assert value("[rack1|rack2]") == "[rack1|rack2]"
    assert value("a \"b' c\\d") == '"a \\"b\' c\\\\d"'


# The script in real bash, with stand-ins for srun and scontrol.


SRUN = """#!/bin/bash
printf '%s\\0' "$@" >srun.words
env -0 >srun.environment
echo "the step speaks"
[ -n "$STEP_SAVES" ] && mkdir -p "$STEP_SAVES"
[ -n "$STEP_TERM" ] && kill -TERM $PPID
exit "${STEP_CODE:-0}"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") [ "$3" = "n[1-2]" ] && printf 'n1\\nn2\\n' ;;
"show node") printf 'NodeName=%s Arch=x86_64\\n   NodeAddr=127.0.0.1 Version=22.05.8\\n' "$3" ;;
requeue*) echo "$2" >>requeued ;;
esac
"""
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_CPUS_PER_TASK": "32",
    "RANK": "3",
    "WORLD_SIZE": "4",
}


def play(text: str, place: Path, **more: str) -> tuple[int, str]:
    """Exit code and output of a script that bash runs as Slurm would."""
    tools = place / "tools"
    tools.mkdir(exist_ok=True)
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    env = {**os.environ, **JOB, **more, "PATH": f"{tools}:{os.environ['PATH']}"}
    env.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        ["bash"], input=text, text=True, cwd=place, env=env, timeout=60, capture_output=True
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def step_words(place: Path) -> list[str]:
    return [os.fsdecode(word) for word in (place / "srun.words").read_bytes().split(b"\0")[:-1]]


def step_environment(place: Path) -> Mapping[str, str]:
    lines = (place / "srun.environment").read_bytes().split(b"\0")[:-1]
    return dict(os.fsdecode(line).partition("=")[::2] for line in lines)


def test_the_step_gets_words_and_environment_whatever_is_in_them(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caption = 'data.caption_prefix=it\'s "a"\r\nline $HOME `id` \\ ü'
    output = "output=a 'b' $c\nd"
    setup = "export FROM_SETUP='a b'\nset -e -o pipefail -u"
    text = printed(["my-run.toml", caption, output, "--nodes", "2", "--gpus", "8", "--setup", setup], capsys)
    code, said = play(text, place)
    assert code == 0, said
    got = step_words(place)
    assert got[got.index(PYTHON) :] == [
        *(PYTHON, "-m", "sfumato", "train", "--gpus", "8", "my-run.toml", caption, output)
    ]
    assert "--cpus-per-task=32" in got and "--ntasks-per-node=1" in got
    env = step_environment(place)
    assert env["FROM_SETUP"] == "a b" and env["PATH"].startswith("/opt/venv/bin:")
    assert env["MASTER_ADDR"] == "127.0.0.1" and env["MASTER_PORT"] == "24711"
    assert "RANK" not in env and "WORLD_SIZE" not in env, "of a launcher around sbatch"
    assert env["OMP_NUM_THREADS"] == "4"
    log = place / "a 'b' $c\nd" / "my-run" / "logs" / "slurm-4711.log"
    assert "the step speaks" in log.read_text() and log.name in said
    assert not (place / "requeued").exists()


def test_a_port_that_somebody_listens_on_is_passed_over(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(["my-run.toml", "--nodes", "2", "--gpus", "8"], capsys)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0 if port_taken(24711) else 24711))
        listener.listen()
        play(text, place)
    assert step_environment(place)["MASTER_PORT"] == "24712"
    play(text, place, SLURM_JOB_ID="4712")
    assert step_environment(place)["MASTER_PORT"] == "24712"


def port_taken(number: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", number)) == 0


def test_only_a_run_that_saved_is_put_back_and_its_code_is_kept(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(["my-run.toml", "--gpus", "8"], capsys)
    for wrong in ("1", "2", "137", "138"):
        assert play(text, place, STEP_CODE=wrong)[0] == int(wrong)
    assert play(text, place, STEP_CODE="75", STEP_TERM="1")[0] == CONTINUE  # scancel
    assert not (place / "requeued").exists()
    assert play(text, place, STEP_CODE="75")[0] == CONTINUE
    assert (place / "requeued").read_text() == "4711\n"
    log = (place / "runs" / "my-run" / "logs" / "slurm-4711.log").read_text()
    assert "exit code 138" in log and "put back into the queue" in log


def test_starts_that_come_no_further_and_too_many_of_them_end_the_job(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(["my-run.toml", "--gpus", "8", "--restarts", "7"], capsys)
    checkpoints, requeued = place / "runs" / "my-run" / "checkpoints", place / "requeued"
    for number, step in enumerate(["", "", "5", "5", "10", "10"], start=1):
        saves = str(checkpoints / f"step-{step:>06}".replace(" ", "0")) if step else ""
        play(text, place, STEP_CODE="75", STEP_SAVES=saves)
        (checkpoints / "step-000400.damaged").mkdir(parents=True, exist_ok=True)
        assert len(requeued.read_text().split()) == number
    assert play(text, place, STEP_CODE="75")[0] == CONTINUE  # the third at step 10
    assert len(requeued.read_text().split()) == 6
    log = place / "runs" / "my-run" / "logs" / "slurm-4711.log"
    assert "3 starts have ended at step-000010: not put back" in log.read_text()
    ended = play(text, place, STEP_CODE="75", STEP_SAVES=str(checkpoints / "step-000015"))
    assert ended[0] == CONTINUE and len(requeued.read_text().split()) == 7
    play(text, place, STEP_CODE="75", STEP_SAVES=str(checkpoints / "step-20"), SLURM_RESTART_COUNT="7")
    assert len(requeued.read_text().split()) == 7
    assert "started again 7 times: not put back" in log.read_text()


def test_a_drawing_is_never_put_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(SCRIPTS["sample"], capsys)
    assert "#SBATCH --no-requeue" in text and "--signal" not in text
    assert play(text, place, STEP_CODE="75")[0] == 75
    got = step_words(place)
    assert got[got.index("sample") :] == [
        *("sample", "--gpus", "8", "runs/my-run", "it's a fox", "--seeds", "1", "2", "--out", "my pictures")
    ]
    assert not (place / "requeued").exists()
    assert (place / "my pictures" / "logs" / "slurm-4711.log").is_file()


# Sweeps.


def test_each_job_of_an_array_is_a_run_of_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(SCRIPTS["sweep"], capsys)
    assert "#SBATCH --array=0-5%2\n" in text
    array = {"SLURM_ARRAY_JOB_ID": "4700"}
    # The number of an array's last job is the array's own: to requeue that one would requeue all.
    code, _ = play(text, place, **array, SLURM_ARRAY_TASK_ID="4", STEP_CODE="75", SLURM_JOB_ID="4700")
    assert code == CONTINUE and (place / "requeued").read_text() == "4700_4\n"
    settings = step_words(place)[-3:]
    assert settings == ["optimizer.lr=3e-5", "seed=1", "name=my-run-lr-3e-5-seed-1"]
    made = load("my-run.toml", settings)
    assert made.optimizer.lr == 3e-5 and made.seed == 1
    assert (made.folder / "logs" / "slurm-4700_4.log").is_file()
    assert play(text, place, **array, SLURM_ARRAY_TASK_ID="6")[0] == 2


def test_values_of_a_sweep() -> None:
    assert axis("seed=0, 1,2") == ("seed", ["0", "1", "2"])
    assert axis("a.b=[512,768],[1024]") == ("a.b", ["[512,768]", "[1024]"])
    assert axis("""x="a, b",'c,"d',it's,e""") == ("x", ['"a, b"', "'c,\"d'", "it's", "e"])
    assert axis(r'x="a\",b",{k=[1,2]}') == ("x", [r'"a\",b"', "{k=[1,2]}"])


def test_what_a_sweep_sets_takes_the_place_of_what_was_set(place: Path) -> None:
    found = runs("my-run.toml", ["seed=7", "optimizer.lr=1e-4"], ["optimizer.lr=1e-5,1e-3"], 1)
    assert [(run.config.seed, run.config.optimizer.lr) for run in found] == [(7, 1e-5), (7, 1e-3)]
    found = runs("my-run.toml", ["method=lora", "method.rank=8"], ["method=full,textual_inversion"], 1)
    assert [run.config.method.kind for run in found] == ["full", "textual_inversion"]


def test_names_of_a_sweep_differ(place: Path) -> None:
    names = [run.config.name for run in runs("my-run.toml", (), ["data.source=a b,a_b"], 1)]
    assert names == ["my-run-0", "my-run-1"], "both would be my-run-source-a_b"
    long = [run.config.name for run in runs("my-run.toml", (), [f"data.source={'a' * 200},b"], 1)]
    assert long == ["my-run-0", "my-run-1"]
    same = runs("my-run.toml", (), ["data.prompt=a,b", "data.source=c"], 1)
    assert [run.settings[-1] for run in same] == [
        "name=my-run-prompt-a-source-c",
        "name=my-run-prompt-b-source-c",
    ]


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no config"),
        (["nothing.toml"], "no such file"),
        (["my-run.toml", "--nodes", "0"], "0 is less than 1"),
        (["my-run.toml", "--gpus", "0"], "0 is less than 1"),
        (["my-run.toml", "--time", "8h"], "'8h' is no time: write 8:00:00"),
        (["my-run.toml", "--time", "0:30"], "less than a minute"),
        (["my-run.toml", "--time", "5", "--grace", "300"], "the time is over after 300"),
        (["my-run.toml", "--gpus", "7"], "does not divide 64"),
        (["my-run.toml", "optimizer.lrr=1"], "did you mean optimizer.lr?"),
        (["my-run.toml", "--mem", "much"], "no size"),
        (["my-run.toml", "--partition", "a\nb"], "breaks a line"),
        (["my-run.toml", "--sbatch", "nodes=3"], "the script's own"),
        (["my-run.toml", "--sbatch", "-x"], "expected one argument"),
        (["my-run.toml", "--gres", "gpu:a100:4"], "say the number with --gpus"),
        (["my-run.toml", "--gres", "gpu:12"], "say the number with --gpus"),
        (["my-run.toml", "--gres", "gpu:"], "no single name"),
        (["my-run.toml", "--gres", "gpu:a100,nvme"], "no single name"),
        (["my-run.toml", "--output", "logs/%j.out"], "no folder logs; Slurm makes none"),
        (["my-run.toml", "--setup", "if true; then"], "bash says"),
        (["my-run.toml", "--max-running", "2"], "no --sweep"),
        (["my-run.toml", "--sweep", "optimizer.lrr=1,2"], "did you mean optimizer.lr?"),
        (["my-run.toml", "--sweep", "seed=1,x"], "--sweep with seed=x"),
        (["my-run.toml", "--sweep", "seed"], "write seed=0,1,2"),
        (["my-run.toml", "--sweep", "seed=1,1"], "1 is there twice"),
        (["my-run.toml", "--sweep", "seed=1", "--sweep", "seed=2"], "it is there twice"),
        (["my-run.toml", "--sweep", "name=a,b"], "gets its own"),
        (["my-run.toml", "--sweep", f"seed={','.join(map(str, range(1001)))}"], "1,001 runs"),
        (["my-run.toml", "--", "sample", "runs/x", "a fox"], "two jobs"),
        (["--", "train", "my-run.toml"], "for a run, sfumato slurm CONFIG"),
        (["--", "sample", "runs/x", "a fox", "--gpus", "2"], "say it before --"),
        (["--", "sample", "runs/x", "a fox", "--stepss", "2"], "unknown argument --stepss"),
        (["--", "cache"], "no config"),
    ],
)
def test_what_cannot_be_is_one_message(
    arguments: list[str], told: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(arguments, capsys)


def test_times_as_slurm_reads_them() -> None:
    read = {"90": 5400, "90:30": 5430, "8:00:00": 28800, "1-12": 129600, "2-0:30": 174600, "1-1:1:1": 90061}
    assert {word: duration(word) for word in read} == read
    assert spelled(129600) == "1-12:00:00" and duration(spelled(90061)) == 90061


def test_options_may_stand_anywhere(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = printed(["--gpus", "8", "my-run.toml", "seed=3"], capsys)
    last = printed(["my-run.toml", "seed=3", "--gpus", "8"], capsys)
    assert first.split("\n", 2)[2] == last.split("\n", 2)[2]


def test_it_imports_no_torch(place: Path) -> None:
    program = "import sys; from sfumato.cli import main; main(['slurm', 'my-run.toml']); "
    program += "assert 'torch' not in sys.modules"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0 and f"python={sys.executable}" in done.stdout, done.stderr
