"""What `sfumato slurm` can be told. Imports no torch."""

import argparse
import re

from sfumato.drawing.options import count, positive
from sfumato.slurm.shell import CONTROL

TIMES = (
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
"""Slurm's ways to write a time."""
UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
GRACE, RESTARTS, FRUITLESS = 300, 100, 3
"""What stands where nothing is said: seconds, starts, starts."""
TAKEN = frozenset(
    {"nodes", "ntasks", "ntasks-per-node", "gpus", "gpus-per-node", "signal", "requeue", "no-requeue"}
    | {"array", "open-mode", "cpus-per-task", "chdir", "export", "wrap", "parsable"}
    | {"gres", "time", "partition", "account", "qos", "mem", "constraint", "job-name", "output", "error"}
)
"""Options of sbatch that the script says itself, or that would break it."""


def slurm_options(command: argparse.ArgumentParser) -> None:
    """What the script asks Slurm for."""
    command.add_argument("config", nargs="?", help="a TOML file, or a preset's name")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as data.resolution=768")
    group = command.add_argument_group("machines")
    group.add_argument("--nodes", type=positive, default=1, metavar="N", help="default: 1")
    group.add_argument("--gpus", type=positive, default=1, metavar="N", help="of each node; default: 1")
    group.add_argument(
        "--gres", type=gres, default="gpu", metavar="NAME", help="as gpu, gpu:a100, npu, dcu; none: CPUs only"
    )
    group.add_argument(
        "--cpus-per-gpu", type=positive, metavar="N", help="default: one for each data worker, and two more"
    )
    group.add_argument("--mem", type=memory, metavar="SIZE", help="of each node, as 200G; 0: all there is")
    group.add_argument("--constraint", type=text, metavar="FEATURES")
    for option in ("--partition", "--account", "--qos", "--job-name"):
        group.add_argument(option, type=text, metavar="NAME")
    group.add_argument("--output", type=text, metavar="FILE", help="default: RUN/logs/slurm-JOB.log")
    group.add_argument(
        "--sbatch",
        action="append",
        default=[],
        type=further,
        metavar="OPTION[=VALUE]",
        help="any other option of sbatch, as reservation=mine or exclusive; again for more",
    )
    group = command.add_argument_group("software")
    group.add_argument(
        "--setup", metavar="BASH", help='before all else, as "module load cuda; source ~/env.sh"'
    )
    group.add_argument("--python", type=text, metavar="FILE", help="default: the one that prints the script")
    group = command.add_argument_group("time")
    group.add_argument(
        "--time", type=duration, metavar="TIME", help="a start's limit as Slurm reads it: 8:00:00, 1-12, 90"
    )
    group.add_argument(
        "--grace",
        type=positive,
        metavar="S",
        help=f"seconds to save before the limit; default: {GRACE}, or a fifth of --time if that is less",
    )
    group.add_argument(
        "--restarts", type=count, default=RESTARTS, metavar="N", help=f"at most; default: {RESTARTS}"
    )
    group.add_argument(
        "--fruitless",
        type=positive,
        default=FRUITLESS,
        metavar="N",
        help=f"starts that end at the same checkpoint, after which it is enough; default: {FRUITLESS}",
    )
    group = command.add_argument_group("many runs")
    group.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="an array of jobs, one for each value; again for more: the product",
    )
    group.add_argument("--max-running", type=positive, metavar="N", help="jobs of the array at one time")


def text(word: str) -> str:
    """What can stand in an #SBATCH line."""
    if not word.strip() or CONTROL.search(word):
        raise argparse.ArgumentTypeError(f"{word!r} is empty, or has a character that breaks a line")
    return word


def gres(word: str) -> str:
    """What the cluster calls a GPU. The number is not said here."""
    if "," in text(word) or re.search(r":(\d{1,2})?$", word):
        raise argparse.ArgumentTypeError(f"{word!r} is no single name: say the number with --gpus")
    return word


def further(word: str) -> str:
    """An option of sbatch that is not ours."""
    name = text(word).lstrip("-").partition("=")[0]
    if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
        raise argparse.ArgumentTypeError(f"{word!r} is no long option: write for example reservation=mine")
    if name in TAKEN:
        raise argparse.ArgumentTypeError(f"{name} is the script's own: see sfumato slurm --help")
    return word.lstrip("-")


def memory(word: str) -> str:
    """A size as Slurm reads it."""
    if not re.fullmatch(r"\d+[KMGTkmgt]?", word):
        raise argparse.ArgumentTypeError(f"{word!r} is no size: write 200G")
    return word


def duration(word: str) -> int:
    """Seconds of a time as Slurm reads it: 90 and 90:00 are minutes, 1:30:00 hours, 1-12 days and hours."""
    for form in TIMES:
        if match := re.fullmatch(form, word, re.ASCII):
            seconds = sum(UNITS[unit] * int(number or 0) for unit, number in match.groupdict().items())
            if seconds < 60:
                raise argparse.ArgumentTypeError(f"{word} is less than a minute")
            return seconds
    raise argparse.ArgumentTypeError(f"{word!r} is no time: write 8:00:00, 1-12:00:00 or 90 (minutes)")


def spelled(seconds: int) -> str:
    """A time that nobody can misread."""
    days, rest = divmod(seconds, 86400)
    return f"{days}-{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
