"""What this process is: a launcher, one of the ranks that a launcher started, or a run of one process.

One command line serves all of them. What a user asks for goes first (--gpus, --nodes, --hostfile), then what
the environment says (torchrun, deepspeed, mpirun, srun), and with neither there is one rank.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sfumato import launch, place, tuning
from sfumato.errors import UserError
from sfumato.launch import alone, hosts, interface
from sfumato.launch.nodes import At

COMING = 600.0
"""Seconds that the first node waits for the last one at most."""
SAME = ("sfumato", "torch", "deepspeed", "diffusers", "transformers")
"""Packages of which all nodes need the same version."""
LOCAL = ("source", "store", "weights", "output", "vae")
"""Settings that say where things lie, which may differ from machine to machine."""


def as_ranks(arguments: argparse.Namespace, logs: Path, settings: Any = None) -> int | None:
    """Start the ranks that the command line asks for: their exit code; None in a process that is a rank.

    logs: the folder for rank-N.log. settings: the config, if the verb has one: its `environment` is set for
    the ranks, `engine.timeout` is how long a machine may be silent, and all machines need the same.
    Raises UserError for options that do not go together, or not with the launcher that started this process.
    """
    if launch.supervised():
        launch.follow_supervisor()
        place.adopt(os.environ)
        return None
    environment: Mapping[str, str] = settings.environment if settings is not None else {}
    at = where(arguments, os.environ, settings.engine.timeout if settings is not None else COMING)
    if arguments.hostfile is not None:
        return hosts.run(arguments.hostfile, arguments.command, arguments.master)
    if at is not None:
        for name in place.VARIABLES:
            os.environ.pop(name, None)  # of the launcher that started one process a node
        facts = same(settings)
        return launch.run(arguments.command, arguments.gpus, logs, environment, at, facts)
    found = place.find(os.environ)
    if found is None and arguments.gpus:
        return launch.run(arguments.command, arguments.gpus, logs, environment)
    refuse_gpus(arguments.gpus)
    if arguments.real:
        tuning.restart(environment)
    place.adopt(os.environ)
    if found is not None and found.world > found.local_world:
        os.environ |= interface.variables(os.environ, interface.toward(os.environ["MASTER_ADDR"]))
    if found is not None and found.world > 1 and arguments.real:
        alone.log_here(found.rank, logs)
    return None


def where(arguments: argparse.Namespace, env: Mapping[str, str], limit: float = COMING) -> At | None:
    """Which of several machines this is, if each of them has a launcher of its own.

    Sets arguments.gpus where DeepSpeed's launcher has brought the hostfile's number. limit: seconds of
    silence after which a machine is lost. Raises UserError for options that make no sense.
    """
    if env.get(hosts.SLOTS):
        return brought(arguments, env, limit)
    given = {name: getattr(arguments, name) for name in ("nodes", "node_rank", "master")}
    if arguments.hostfile is not None:
        for name in ("gpus", "nodes", "node_rank"):
            if getattr(arguments, name) is not None:
                option = f"--{name.replace('_', '-')} {getattr(arguments, name)}"
                raise UserError(f"--hostfile and {option}", "the file says that", f"leave {option} out")
        return None
    nodes = arguments.nodes
    if nodes is None:
        for name in ("node_rank", "master"):
            if given[name] is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} {given[name]}", "no --nodes", "say of how many: --nodes N")
        return slurm_node(arguments, env, limit)
    asked = f"--nodes {nodes}"
    if not arguments.gpus:
        raise UserError(asked, "no --gpus", "say how many ranks each of them starts: --gpus G")
    found = place.find(env)
    if found is not None and found.local_world > 1:
        refuse_gpus(arguments.gpus)
    if nodes == 1:
        return None
    if arguments.master is None:
        raise UserError(asked, "no --master", "name node 0, as the others reach it: --master HOST[:PORT]")
    if arguments.node_rank is None:
        raise UserError(asked, "no --node-rank", f"number the machines: --node-rank 0 to {nodes - 1}")
    if not 0 <= arguments.node_rank < nodes:
        found_text = f"--node-rank {arguments.node_rank}"
        raise UserError(asked, found_text, f"number the machines from 0 to {nodes - 1}")
    host, port = interface.address(arguments.master)
    return At(arguments.node_rank, nodes, host, port, limit)


def slurm_node(arguments: argparse.Namespace, env: Mapping[str, str], limit: float) -> At | None:
    """Under `srun` with one task a node and --gpus: that node, of those of the step."""
    found = place.find(env)
    if not arguments.gpus or found is None or found.by != "srun":
        return None
    name = "SLURM_STEP_NUM_NODES" if env.get("SLURM_STEP_NUM_NODES") else "SLURM_NNODES"
    if found.world != place.number(env, name, "srun"):
        return None
    said = {"MASTER_PORT": place.port(env) or str(interface.PORT)}
    return At(
        place.number(env, "SLURM_NODEID", "srun"),
        found.world,
        env.get("MASTER_ADDR") or place.first_node(env.get("SLURM_STEP_NODELIST", "")),
        place.number(said, "MASTER_PORT", "srun"),
        limit,
    )


def brought(arguments: argparse.Namespace, env: Mapping[str, str], limit: float) -> At | None:
    """On a machine of a hostfile: what DeepSpeed's launcher says of it."""
    slots: Sequence[int] = json.loads(env[hosts.SLOTS])
    number = int(env["RANK"])  # it starts one process a machine
    arguments.gpus, arguments.hostfile = slots[number], None
    at = At(number, len(slots), env["MASTER_ADDR"], int(env["MASTER_PORT"]), limit, env.get(hosts.WORD, ""))
    for name in (hosts.SLOTS, hosts.WORD):
        os.environ.pop(name, None)
    return at


def same(settings: Any) -> dict[str, str]:
    """What must be the same on all machines of one run, by name."""
    facts = {}
    for name in SAME:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "not installed"
    if settings is not None:
        for table, values in settings.model_dump(mode="json").items():
            facts[f"config, {table}"] = digest(values) if table not in LOCAL else ""
    return facts


def digest(values: Any) -> str:
    """A table of settings without places: itself where it is short, else a hash."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(each) for key, each in value.items() if key not in LOCAL}
        return [cleaned(each) for each in value] if isinstance(value, list) else value

    text = json.dumps(cleaned(values), sort_keys=True)
    return text if len(text) < 60 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def refuse_gpus(gpus: int | None) -> None:
    """Raise UserError for --gpus where a launcher has started us as one of its ranks already."""
    found = place.find(os.environ)
    if gpus and found is not None:
        raise UserError(
            f"--gpus {gpus}",
            f"this process is rank {found.rank} of the {found.world} that {found.by} started",
            "leave --gpus out: each of them is one rank",
        )


def world(arguments: argparse.Namespace) -> int:
    """How many ranks the command line and the environment ask for, all machines together."""
    if arguments.hostfile is not None:
        return sum(hosts.read(arguments.hostfile).values())
    if arguments.nodes is not None and arguments.gpus:
        return int(arguments.nodes * arguments.gpus)  # where they meet is of no interest here
    at = where(arguments, os.environ)
    if at is not None:
        return at.count * int(arguments.gpus)
    refuse_gpus(arguments.gpus)
    found = place.find(os.environ)
    return found.world if found is not None else arguments.gpus or 1
