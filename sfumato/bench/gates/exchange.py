"""What ranks send each other in a step: counted on real ranks, and foretold by the planner's formula.

    RANK=0 WORLD_SIZE=2 ... python -m sfumato.bench.gates.exchange MODEL FILE

is one rank: it trains the model of a diffusers folder for a step at every ZeRO stage, and writes what was
counted as JSON.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from sfumato import tuning
from sfumato.bench.gates.count import Counting
from sfumato.bench.gates.ours import Counts, counts_of, start_of, step
from sfumato.bench.work import Numbers, batch_of, drawn, method_of
from sfumato.config import Config, parse
from sfumato.models.folder import Facts
from sfumato.planner.architectures import facts_of
from sfumato.planner.trace import trace
from sfumato.planner.traffic import exchange, traffic

STAGES = (0, 1, 2, 3)
SIDE = 64
ALL_AWAY = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
}
"""Stage 3 puts every weight away after its use, as those of large models; by itself it keeps a toy's."""
LIMIT = 300.0
"""Seconds that the ranks may take."""
TWICE = ("allreduce_", "allreduce_coalesced_")
"""Collectives that send a tensor around twice: summed in shards, and gathered."""


def sent_by(sent: Mapping[str, int], world: int) -> int:
    """Bytes that one of `world` ranks sends, of the whole tensors of each collective, by name."""
    return sum(exchange(size, 2 if name in TWICE else 1, world, world).link for name, size in sent.items())


def foretold(config: Config, facts: Facts, size: tuple[int, int], world: int) -> int:
    """The same by the planner's formula; config: of `world` ranks, all on one machine."""
    cost = trace(config, facts, size)
    return traffic(config, world, world, sum(map(prod, cost.trained.values())), cost.sharded).link


def toy(model: Path, stage: int, world: int, precision: str = "bf16") -> Config:
    """A run on a toy model, one micro-batch a step on each rank."""
    return parse(
        {
            "steps": 10,
            "batch_size": 2 * world,
            "micro_batch_size": 2,
            "model": {"weights": str(model)},
            "data": {"source": "pictures", "resolution": SIDE, "cache": "both", "views": 1},
            "engine": {"precision": precision, "zero_stage": stage, "deepspeed": ALL_AWAY},
        }
    )


def counted(model: Path, stage: int) -> Counts:
    """A step of real ranks at a stage; all of them call it together."""
    from sfumato.engine import ranks

    place = ranks.start(LIMIT)
    config = toy(model, stage, place.world)
    method = method_of(config, facts_of(config.model), place.device)
    engine, objective = start_of(config, place, method, Numbers(place.device))
    make = drawn(torch.Generator().manual_seed(place.rank))
    batch = batch_of(config, method.family, (SIDE, SIDE), config.micro_batch_size, make)
    counting = Counting()
    with counting:
        for _ in range(2):
            step(counting, engine, method, objective, batch)
    return counts_of(counting)


def main(model: Path, file: Path) -> None:
    """One rank's work: every stage in turn."""
    found = {str(stage): vars(counted(model, stage)) for stage in STAGES}
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(found), encoding="utf-8")


def on_two_ranks() -> list[dict[str, Any]]:
    """Real gloo ranks on a toy model: what each stage sends, and what the formula says.

    [{"stage", "collectives" {name: how many}, "sent" (bytes of a rank), "foretold"}].
    """
    from sfumato.models import family_class

    world = 2
    with tempfile.TemporaryDirectory(prefix="sfumato-ranks-") as scratch:
        model, file = Path(scratch) / "model", Path(scratch) / "found.json"
        family_class("sd").tiny(model)
        env = {**os.environ, **tuning.missing(os.environ, world), "WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "sfumato.bench.gates.exchange", str(model), str(file)]
        logs = [Path(scratch) / f"{rank}.log" for rank in range(world)]
        ranks = []
        try:
            for rank, log in enumerate(logs):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with log.open("wb") as words:
                    ranks.append(subprocess.Popen(command, env=env | own, stdout=words, stderr=words))
            codes = [process.wait(LIMIT) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(codes):
            tail = logs[codes.index(max(codes))].read_text(errors="replace")[-3000:]
            raise RuntimeError(f"two ranks on a toy model ended with {codes}:\n{tail}")
        every = json.loads(file.read_text(encoding="utf-8"))
        rows = []
        for stage in STAGES:
            config, seen = toy(model, stage, world), every[str(stage)]
            said = foretold(config, facts_of(config.model), (SIDE, SIDE), world)
            row = {"stage": stage, "collectives": seen["collectives"], "sent": sent_by(seen["sent"], world)}
            rows.append(row | {"foretold": said})
    return rows


def free_port() -> int:
    """One that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
