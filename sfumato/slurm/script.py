"""The text of an sbatch script."""

from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.errors import CONTINUE
from sfumato.slurm.shell import quote, words


@dataclass(frozen=True)
class Start:
    """What one job of an array does beside the others: the folder that it writes to, and own settings."""

    folder: str
    settings: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """What the script does, after all of it was checked."""

    said: Sequence[str]
    """The command that printed it."""
    lines: Sequence[str]
    """What stands behind #SBATCH."""
    command: Sequence[str]
    """sfumato's words, without --gpus."""
    starts: Sequence[Start]
    python: str
    nodes: int
    gpus: int
    cpus: int
    """Cores of a rank."""
    setup: str = ""
    array: bool = False
    own_log: bool = True
    """Whether it writes its log into the folder; else Slurm has it."""
    resumes: bool = True
    """Whether the command goes on after exit code 75."""
    restarts: int = 0
    fruitless: int = 1


def script(job: Job) -> str:
    """All of it, with a newline at its end."""
    parts = [head(job), place(job), software(job)]
    if job.nodes > 1:
        parts.append(master())
    parts += [step(job), again(job) if job.resumes else ['exit "$code"']]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def head(job: Job) -> list[str]:
    """What Slurm reads."""
    return ["#!/bin/bash", f"# {words(job.said)}", *(f"#SBATCH {line}" for line in job.lines)]


def place(job: Job) -> list[str]:
    """Which run it is, and where its log lies."""
    if job.array:
        lines = ["job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID", 'case "$SLURM_ARRAY_TASK_ID" in']
        for number, start in enumerate(job.starts):
            lines.append(f"{number}) run={quote(start.folder)} settings=({words(start.settings)}) ;;")
        lines += ['*) echo "no run has the number $SLURM_ARRAY_TASK_ID"; exit 2 ;;', "esac"]
    else:
        lines = ["job=$SLURM_JOB_ID", f"run={quote(job.starts[0].folder)}"]
    lines.append('mkdir -p "$run/logs" || exit 1')
    if job.own_log:
        lines += [
            'echo "$(date +%FT%T) on $SLURM_JOB_NODELIST; the log is $run/logs/slurm-$job.log"',
            'exec >>"$run/logs/slurm-$job.log" 2>&1',
        ]
    lines.append('echo "$(date +%FT%T) start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"')
    return lines


def software(job: Job) -> list[str]:
    """The environment that the ranks get."""
    lines = ["# sbatch hands on what the shell had that called it, but a place among ranks is not ours."]
    lines.append("unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT")
    if job.setup:
        # What it may have set would end this script where a command says no.
        lines += [*job.setup.split("\n"), "set +e +u +o pipefail"]
    lines.append(f"python={quote(job.python)}")
    if "/" in job.python:
        lines.append('export PATH="${python%/*}:$PATH"')
    lines.append(f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{job.cpus}}}")
    return lines


def master() -> list[str]:
    """Where rank 0 listens: the first node, which runs the script, on a port that is free there."""
    return [
        "# Where the ranks meet: this node, by the name that Slurm itself uses, on a port that is free here.",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        'MASTER_ADDR=$(scontrol show node "$first" | sed -n "s/.*NodeAddr=\\([^ ]*\\).*/\\1/p")',
        "MASTER_ADDR=${MASTER_ADDR:-$first}",
        "for try in {0..99}; do",
        "    MASTER_PORT=$((20000 + (SLURM_JOB_ID + try) % 10000))",
        '    timeout 5 bash -c ": >/dev/tcp/$MASTER_ADDR/$MASTER_PORT" 2>/dev/null || break',
        "done",
        "export MASTER_ADDR MASTER_PORT",
    ]


def step(job: Job) -> list[str]:
    """One task on each node: a supervisor, which starts this node's ranks."""
    verb, *rest = job.command
    command = f'"$python" -m sfumato {quote(verb)} --gpus {job.gpus} {words(rest)}'
    command += ' "${settings[@]}"' if job.array else ""
    ended = ["ended=", "trap 'ended=yes' TERM"] if job.resumes else []
    return [
        "# One task a node, which starts and watches this node's ranks. Each finds out itself who is lost.",
        *ended,
        "code=0",
        'srun --export=ALL --mpi=none --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\',
        "    --cpu-bind=none --kill-on-bad-exit=0 --wait=0 \\",
        f"    {command} || code=$?",
        'echo "$(date +%FT%T) exit code $code"',
    ]


def again(job: Job) -> list[str]:
    """A run that was asked to stop and has saved is put back into the queue, unless it comes no further."""
    enough = "not put back into the queue"
    return [
        f"# {CONTINUE}: asked to stop, saved, can go on. All else is an end, and so is scancel.",
        f'[ "$code" -eq {CONTINUE} ] && [ -z "$ended" ] || exit "$code"',
        "at=$(find \"$run/checkpoints\" -maxdepth 1 -name 'step-*[0-9]' 2>/dev/null | sort -V | tail -n 1)",
        "at=${at##*/} ends=$run/logs/slurm-$job.ends",
        'echo "${at:-step 0}" >>"$ends"',
        f'if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {job.restarts} ]; then',
        f'    echo "started again {job.restarts} times: {enough}"',
        f'elif [ "$(grep -cxF "${{at:-step 0}}" "$ends")" -ge {job.fruitless} ]; then',
        f'    echo "{job.fruitless} starts have ended at ${{at:-step 0}}: {enough}"',
        "else",
        '    echo "put back into the queue"',
        '    scontrol requeue "$job"',
        "fi",
        'exit "$code"',
    ]
