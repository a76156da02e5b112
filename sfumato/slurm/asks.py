"""What the script asks of Slurm: its #SBATCH lines."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from sfumato.errors import UserError
from sfumato.slurm.options import GRACE, spelled
from sfumato.slurm.shell import value


def lines(arguments: argparse.Namespace, name: str, cpus: int, array: int = 0) -> Iterator[str]:
    """What stands behind #SBATCH. cpus: of each rank. array: jobs, 0 for one that is no array.

    Raises UserError for what Slurm would refuse, or obey in silence where nobody wants it.
    """
    yield f"--job-name={value(arguments.job_name or name)}"
    yield f"--nodes={arguments.nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={cpus * arguments.gpus}"
    if arguments.gres != "none":
        yield f"--gres={value(arguments.gres)}:{arguments.gpus}"
    for key in ("mem", "partition", "account", "qos", "constraint"):
        if (said := getattr(arguments, key)) is not None:
            yield f"--{key}={value(said)}"
    if arguments.time is not None:
        yield f"--time={spelled(arguments.time)}"
    for said in arguments.sbatch:
        key, equals, what = said.partition("=")
        yield f"--{key}={value(what)}" if equals else f"--{key}"
    verb = "train" if arguments.other is None else arguments.other.verb
    if verb == "train":
        yield f"--signal=USR1@{grace(arguments.grace, arguments.time)}"
    # A drawing that begins anew would draw again what it has drawn.
    yield "--no-requeue" if verb == "sample" else "--requeue"
    yield "--open-mode=append"
    if array:
        yield f"--array=0-{array - 1}" + (f"%{arguments.max_running}" if arguments.max_running else "")
    yield f"--output={value(output(arguments.output, array))}"


def grace(asked: int | None, time: int | None) -> int:
    """Seconds from Slurm's warning to the end of the time."""
    if asked is None:
        return GRACE if time is None else min(GRACE, time // 5)
    if time is not None and asked >= time:
        found = f"the time is over after {time}"
        raise UserError(f"--grace {asked} (seconds)", found, "leave time to train: less --grace, more --time")
    return asked


def output(asked: str | None, array: int) -> str:
    """Where Slurm writes what the script says. Raises UserError for a folder that is not there."""
    if asked is None:
        return "slurm-%A_%a.out" if array else "slurm-%j.out"
    folder = Path(asked).parent
    if not folder.is_dir():
        found = f"no folder {folder}; Slurm makes none, and the job would end without a word"
        raise UserError(f"--output {asked}", found, "make it, or leave --output out: RUN/logs is made")
    return asked
