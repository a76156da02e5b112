"""What may stand in `[environment]`: variables that every rank of a run gets before torch starts."""

import re
from typing import Any

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PLACE: tuple[str, ...] = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK")
PLACE += ("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE")
MASTER = ("MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "TORCHELASTIC_", "SFUMATO_")
SECRET = re.compile(r"TOKEN$|SECRET|PASSW|CREDENTIAL|(^|_)KEY(_ID)?$", re.IGNORECASE)
"""Names that are taken for a secret's."""
LOGIN = re.compile(r"://[^/\s]*@")
"""An address with a login in it."""


def texts(values: Any) -> Any:
    """The table with every value as text, where it is a table; pydantic refuses the rest.

    Raises ValueError for a name that no shell could set, one that is not the user's to set, a secret, and a
    value that is neither text nor a number.
    """
    return {name: text(name, value) for name, value in values.items()} if isinstance(values, dict) else values


def text(name: str, value: Any) -> str:
    """One variable's value, after both were found right."""
    if (wrong := refusal(name)) is not None:
        raise ValueError(f"environment.{name}: {wrong}")
    if isinstance(value, bool):
        word = str(value).lower()
        raise ValueError(
            f"environment.{name} = {word}: programs read a switch in their own words; "
            f'write "{int(value)}" or "{word}", in quotes'
        )
    if isinstance(value, dict | list) or not isinstance(value, str | int | float):
        raise ValueError(f"environment.{name} = {value!r}: a variable is one text; write it in quotes")
    if LOGIN.search(str(value)):
        raise ValueError(
            f"environment.{name} holds an address with a login, and resolved.json would keep it; "
            "set it in the shell"
        )
    if "\0" in str(value):
        raise ValueError(f"environment.{name} holds a zero byte, which no variable can")
    return str(value)


def refusal(name: str) -> str | None:
    """Why a variable may not stand in the table, and what to do; None if it may."""
    if not NAME.fullmatch(name):
        return "no such name can be set; take letters, digits and _, and begin with no digit"
    if name in PLACE or name.startswith(LAUNCHERS):
        return "it tells a rank its place, and is the launcher's to set; leave it out, use --gpus and --nodes"
    if name in MASTER:
        return "it tells the ranks where to meet; leave it out, use --master or the shell's variable"
    if SECRET.search(name):
        return "it looks like a secret, and resolved.json would keep it; set it in the shell"
    return None
