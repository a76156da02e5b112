"""Who am I: this process's rank, from whatever started it: torchrun, deepspeed, mpirun, srun or launch.py."""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from sfumato.errors import UserError


@dataclass(frozen=True)
class Place:
    """Rank `rank` of `world`, the `local_rank`-th of `local_world` of its machine; `by` is the launcher."""

    rank: int
    local_rank: int
    world: int
    local_world: int
    by: str


@dataclass(frozen=True)
class Names:
    """The environment variables in which one kind of launcher tells a process its place."""

    by: str
    rank: str
    world: str
    local_rank: str
    local_world: str


# SLURM_STEP_NUM_TASKS and not SLURM_NTASKS: the batch script itself has the latter, and is not a rank.
LAUNCHERS = (
    Names("torchrun or deepspeed", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    Names(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Names("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Names("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)
SLURM_PORTS = range(20000, 30000)
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `adopt` writes."""


def find(env: Mapping[str, str]) -> Place | None:
    """The place that a launcher gave this process; None where nobody started it as one of several ranks.

    Raises UserError for a variable that is missing beside the others or is not a number.
    """
    for names in LAUNCHERS:
        if names.rank not in env or names.world not in env:
            continue
        if names.rank == "PMI_RANK" and all(
            env.get(theirs) == env.get(srun)
            for theirs, srun in (("PMI_RANK", "SLURM_PROCID"), ("PMI_SIZE", "SLURM_STEP_NUM_TASKS"))
        ):
            continue  # srun --mpi=pmi2, the default of some clusters; it says more by its own names
        world = number(env, names.world, names.by)
        if world == 1 and names.rank != "RANK":
            # One task of mpirun or srun may start ranks of its own with --gpus.
            continue
        rank = number(env, names.rank, names.by)
        local_world = world
        if env.get(names.local_world, "").isdecimal():
            local_world = number(env, names.local_world, names.by)
        elif names.by == "srun":
            local_world = tasks_here(env) or world
        if names.local_rank in env:
            local_rank = number(env, names.local_rank, names.by)
        else:
            local_rank = rank % local_world
        if not 0 <= rank < world:
            raise UserError(
                f"{names.rank}={rank} from {names.by}", f"{names.world}={world}", "start it again"
            )
        return Place(rank, local_rank, world, local_world, names.by)
    return None


def is_further(env: Mapping[str, str]) -> bool:
    """Whether this process is a rank beside the first of its machine."""
    try:
        found = find(env)
    except UserError:
        return False
    return found is not None and found.local_rank > 0


def number(env: Mapping[str, str], name: str, by: str) -> int:
    """An integer. Raises UserError where it is none, or not there."""
    try:
        return int(env[name])
    except (KeyError, ValueError):
        found = f"{name}={env[name]!r}" if name in env else f"no {name}"
        raise UserError(f"a place among the ranks of {by}", found, f"set {name} to a number") from None


def tasks_here(env: Mapping[str, str]) -> int | None:
    """How many tasks of a step of Slurm run on this node: SLURM_STEP_TASKS_PER_NODE is such as "4(x2),3"."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = env.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def adopt(env: MutableMapping[str, str]) -> Place | None:
    """Find this process's place and write it as RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises UserError where the launcher does not say where rank 0 listens.
    """
    place = find(env)
    if place is None:
        return None
    addresses = {"MASTER_ADDR": address(env, place), "MASTER_PORT": port(env)}
    env.update({name: value for name, value in addresses.items() if value})
    for name, example in (("MASTER_ADDR", "the name of the machine of rank 0"), ("MASTER_PORT", "29500")):
        if not env.get(name):
            raise UserError(
                f"rank {place.rank} of {place.world}, as {place.by} says",
                f"{name} is not set, so the ranks cannot find each other",
                f"set it on all ranks: {example}; or let `sfumato train --gpus N` start them",
            )
    env.update(RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), WORLD_SIZE=str(place.world))
    env.setdefault("LOCAL_WORLD_SIZE", str(place.local_world))
    return place


def address(env: Mapping[str, str], place: Place) -> str | None:
    """The machine of rank 0: as said, else Slurm's first node, else this one if all ranks are on it."""
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if place.by == "srun" and nodes:
        return first_node(nodes)
    return "127.0.0.1" if place.world == place.local_world and place.by != "srun" else None


def port(env: Mapping[str, str]) -> str | None:
    """The port of rank 0: as said, else one that all ranks of the same job agree on."""
    job = env.get("SLURM_JOB_ID") or env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid")
    if env.get("MASTER_PORT") or not job:
        return env.get("MASTER_PORT")
    digits = int(re.sub(r"\D", "", job) or 0)
    return str(SLURM_PORTS[digits % len(SLURM_PORTS)])


def first_node(nodes: str) -> str:
    """The first name of Slurm's list: "gpu[03-05,9],cpu1" begins with "gpu03", "r[1-2]n[3-4]" with "r1n3"."""
    first = re.match(r"(?:[^,\[\]]|\[\d[^\]]*\])+", nodes)
    if first is None:
        raise UserError("Slurm's list of nodes", repr(nodes), "set MASTER_ADDR on all ranks")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
