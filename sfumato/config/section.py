"""What every table of the config file is."""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A table of the config file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        """Leave `true` for a number as a word, which is refused: Python would count it as 1."""
        if not isinstance(values, dict):
            return values
        numbers = numbers_of(cls)
        return {name: worded(value) if name in numbers else value for name, value in values.items()}


@cache
def numbers_of(section: type[BaseModel]) -> frozenset[str]:
    """A table's settings that are numbers, or hold some, and are never true or false."""
    kinds = {name: kinds_of(field.annotation) for name, field in section.model_fields.items()}
    return frozenset(name for name, found in kinds.items() if found & {int, float} and bool not in found)


def kinds_of(annotation: Any) -> set[type]:
    """Which of bool, int and float a field's value, or what is in it, may be."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return {type(part) for part in parts}
    return set().union(*map(kinds_of, parts)) if parts else {annotation} & {bool, int, float}


def worded(value: Any) -> Any:
    """A value, or a list of them, with words for true and false."""
    if isinstance(value, list | tuple):
        return [worded(each) for each in value]
    return str(value).lower() if isinstance(value, bool) else value


def named(default: str) -> Callable[[Any], Any]:
    """For a setting that is a table of one of several kinds: let the kind stand for its table.

    `weight = "min_snr"` is `weight = { kind = "min_snr" }`, and a table without a kind is of the default one.
    """

    def whole(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": default, **value} if isinstance(value, dict) else value

    return whole
