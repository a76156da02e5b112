"""What every table of the config file is."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of the config file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def named(default: str) -> Callable[[Any], Any]:
    """For a setting that is a table of one of several kinds: let the kind stand for its table.

    `weight = "min_snr"` is `weight = { kind = "min_snr" }`, and a table without a kind is of the default one.
    """

    def whole(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": default, **value} if isinstance(value, dict) else value

    return whole
