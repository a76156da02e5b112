"""`sfumato plan`: what a run takes and how it is best held, before a device is rented."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.planner.answer import Answer, answer, held, nothing_fits
from sfumato.planner.architectures import facts_of
from sfumato.planner.costs import cost_of
from sfumato.planner.devices import DEVICES, find, like
from sfumato.planner.fit import reserve
from sfumato.planner.rows import Ask, check_asked, speeds_on, told
from sfumato.planner.table import heading, lines, shown

MOST = 1e6
"""GB above which a size of memory was typed wrong."""


def plan(
    config: Config,
    gpus: int,
    nodes: int,
    memory: float | None,
    device: str | None,
    every: bool = False,
    records: int | None = None,
    file: Path | None = None,
    host: float | None = None,
) -> None:
    """Print the plan of a run on `nodes` machines of `gpus` devices, and write it to a file.

    memory: GB of a device; unset: the named device's. host: GB of a machine's own memory; unset: enough.
    Raises UserError for a device that is not known, a config that cannot be run so, and where nothing fits.
    """
    if memory is None and device is None:
        do = "say --memory 80, or --device A100-80"
        raise UserError(f'a plan of "{config.name}"', "neither --memory nor --device", do)
    for option, given, as_in in (("--memory", memory, 24), ("--host-memory", host, 256)):
        if given is not None and not 0 < given < MOST:
            raise UserError(f"{option} {given:g}", "that is no size", f"give GB, such as {option} {as_in}")
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"--json {file}", f"no folder {file.absolute().parent}", "make it, or name another")
    named = find(device) if device is not None else None
    size = 1e9 * (memory if memory is not None else named.memory if named is not None else 0)
    own = None if host is None else 1e9 * host
    check_asked(config, gpus * nodes)
    ask = Ask(config, facts_of(config.model), gpus * nodes, gpus, size, named or like(size), host=own)
    print("\n".join(heading(ask)), end="\n\n", flush=True)  # the rest may take a minute
    found = answer(ask, every)
    print("\n".join(lines(found, every, records)))
    if file is not None:
        file.write_text(json.dumps(whole(found), indent=1) + "\n", encoding="utf-8")
    if found.best is None:
        raise nothing_fits(found)


def whole(found: Answer) -> dict[str, Any]:
    """Everything, for JSON: bytes, FLOPs and seconds."""
    ask, best = found.ask, found.best
    out: dict[str, Any] = {
        "name": ask.config.name,
        "ranks": ask.world,
        "ranks_of_a_machine": ask.local,
        "memory": ask.memory,
        "reserve": reserve(ask.memory),
        "device": asdict(ask.device),
        "rows": [told(row) for row in found.rows],
        "recommended": None,
    }
    if best is not None:
        out["recommended"] = told(best) | {
            "reason": found.reason,
            "settings": {"micro_batch_size": best.micro, "engine": held(best)},
        }
        out["sizes"] = []
        for high, wide in shown(ask.sizes):
            cost = asdict(cost_of(ask.config, ask.facts, best.way, (high, wide)))
            learns = {"trained": sum(1 for _ in cost.pop("trained")), "width": wide, "height": high}
            out["sizes"].append(learns | cost)
        out["devices"] = {
            device.name: {
                name: {"images_per_second": found_.images, "seconds": ask.config.steps * found_.step}
                for name, found_ in speeds_on(device, ask, best.config, best.cost, best.traffic).items()
            }
            for device in DEVICES
            if device.memory * 1e9 >= best.memory.device
        }
    return out
