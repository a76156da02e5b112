"""`sfumato plan`: what a run takes and how it is best held, before a device is rented."""

import json
from pathlib import Path

from sfumato import tuning
from sfumato.config import Config
from sfumato.drawing.options import check_file
from sfumato.errors import UserError
from sfumato.planner.devices import find, like
from sfumato.planner.ways import check_asked

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
    alone: bool = False,
) -> None:
    """Print the plan of a run on `nodes` machines of `gpus` devices, and write it to a file.

    memory: GB of a device; unset: the named device's. host: GB of a machine's own memory; unset: enough.
    alone: this process does nothing else, and imports no more than a plan needs.
    Raises UserError for a device that is not known, a config that cannot be run so, and where nothing fits.
    """
    if memory is None and device is None:
        do = "say --memory 80, or --device A100-80"
        raise UserError(f'a plan of "{config.name}"', "neither --memory nor --device", do)
    for option, given, as_in in (("--memory", memory, 24), ("--host-memory", host, 256)):
        if given is not None and not 0 < given < MOST:
            raise UserError(f"{option} {given:g}", "that is no size", f"give GB, such as {option} {as_in}")
    if file is not None:
        check_file(f"--json {file}", file)
    named = find(device) if device is not None else None
    size = 1e9 * (memory if memory is not None else named.memory if named is not None else 0)
    own = None if host is None else 1e9 * host
    check_asked(config, gpus * nodes)
    config = config.on(gpus * nodes)
    unneeded = tuning.unneeded(config.method) if alone else ()
    with tuning.importing(unneeded):  # which takes seconds, so that a mistake above is told before
        from sfumato.planner.answer import answer, nothing_fits
        from sfumato.planner.architectures import facts_of
        from sfumato.planner.rows import Ask
        from sfumato.planner.table import heading, lines, whole

    ask = Ask(config, facts_of(config.model), gpus * nodes, gpus, size, named or like(size), host=own)
    print("\n".join(heading(ask)), end="\n\n", flush=True)  # the rest may take a minute
    found = answer(ask, every)
    print("\n".join(lines(found, every, records)))
    if file is not None:
        file.write_text(json.dumps(whole(found), indent=1) + "\n", encoding="utf-8")
    if found.best is None:
        raise nothing_fits(found)
