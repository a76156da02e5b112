"""`engine = "auto"`: the planner's choice at the start of a run, for the devices that it has."""

from collections.abc import Callable
from typing import Any

from sfumato.config import Config
from sfumato.device import accelerator, kind, name_of
from sfumato.engine.offload import host_memory
from sfumato.engine.size import readable
from sfumato.planner.answer import Answer, answer, nothing_fits
from sfumato.planner.architectures import facts_of
from sfumato.planner.devices import like
from sfumato.planner.fit import reserve
from sfumato.planner.rows import Ask
from sfumato.planner.table import spelt
from sfumato.planner.ways import settings

Choice = dict[str, Any]
"""Settings by name: those of [engine] under "engine", and micro_batch_size."""


def decide(
    config: Config,
    world: int,
    local: int,
    memory: float,
    called: str,
    host: float,
    tell: Callable[[str], None],
) -> Choice:
    """What the planner chooses for a config that asks for it; `tell` hears of it.

    world: ranks, `local` on each machine. memory: bytes of the smallest device. called: what its maker calls
    it, or "cpu". host: bytes of the smallest machine's own memory. Raises UserError where nothing fits.
    """
    seam = "cpu" if called == "cpu" else "device"
    device = like(memory, called)
    ask = Ask(config, facts_of(config.model), world, local, memory, device, seam, host)
    found = answer(ask, better=True)
    if found.best is None:
        raise nothing_fits(found)
    tell(described(found))
    return choice(found)


def room(local: int) -> tuple[float, str]:
    """Bytes of this process's device, and what it is called; `local` ranks share a CPU's memory."""
    name = kind()
    memory = float(accelerator().total_memory())
    if name == "cpu":
        return memory / local, name
    import torch

    return memory, name_of(torch.device(accelerator().current_device_name()))


def here(config: Config, world: int, local: int, tell: Callable[[str], None]) -> Config:
    """The config as ranks on machines like this one would choose it; one that does not ask stays as it is."""
    if not config.engine.auto:
        return config
    return chosen(config, decide(config, world, local, *room(local), host_memory(), tell))


def choice(found: Answer) -> Choice:
    """What was chosen, as settings."""
    assert found.best is not None, "nothing was chosen"
    row = found.best
    return {"engine": settings(row.config, row.way), "micro_batch_size": row.micro}


def chosen(config: Config, what: Choice) -> Config:
    """The config with a choice put in, checked like one that was read."""
    values = config.model_dump(exclude_unset=True)
    values["engine"] = {**values.get("engine", {}), "auto": True, **what["engine"]}
    return Config.model_validate(values | {"micro_batch_size": what["micro_batch_size"]})


def described(found: Answer) -> str:
    """What is told of a choice."""
    assert found.best is not None, "nothing was chosen"
    row, memory = found.best, found.ask.memory
    free = readable(round(reserve(memory)))
    return (
        f'engine = "auto" became {spelt(row)}: a rank takes {readable(row.memory.device)} of '
        f"{readable(round(memory))}, {free} stay free; {found.reason}"
    )
