"""From a TOML file and the command line to a Config, or to one message with every mistake."""

import difflib
import itertools
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sfumato.config.run import Config
from sfumato.errors import UserError

PRESETS = Path(__file__).parents[1] / "presets"
KINDS = {"method", "timesteps", "weight"}
"""Settings that are a table of one of several kinds."""
SWITCHED = {"buckets", "validation"}
"""Tables that are off unless they are there; `true` is an empty one."""
PLANNED = ("zero_stage", "gradient_checkpointing", "offload_optimizer", "offload_parameters")
"""Settings of [engine] that the planner may choose; the others move numbers, or are the user's."""


SPELT = {
    "name": "it names a folder: letters, digits, dots, - and _, from a letter or digit on",
    "word": "it is one word, without blanks",
    "push_to_hub": "a repository is OWNER/NAME",
}
"""How settings with a pattern are written."""


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, or a preset by its name, apply `key=value` overrides and check everything.

    Raises UserError with every mistake found, each with its place and, for a misspelt key, the nearest
    right one.
    """
    path = find(source)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the config {path}", f"it is not valid TOML: {error}", "mend that line") from None
    if set(values) == {"sample"}:
        raise UserError(f"the config {path}", "it says what to draw", f"sfumato sample {source}")
    if any(word.replace('"', "").replace(" ", "") == "engine=auto" for word in overrides):
        overrides = [word for word in overrides if not word.replace(" ", "").startswith("engine=")]
        free_engine(values)
    check_once(overrides)
    # A table as a whole goes before what is in it, in whichever order they were said.
    for override in sorted(overrides, key=lambda override: key_of(override).count(".")):
        set_value(values, override)
    return parse(values, str(path))


def find(source: str | Path) -> Path:
    """The file of a config path or a preset name."""
    path = Path(source)
    if path.is_file():
        return path
    preset = PRESETS / f"{source}.toml"
    if preset.is_file():
        return preset
    names = sorted(file.stem for file in PRESETS.glob("*.toml"))
    near = difflib.get_close_matches(str(source), names, 1)
    hint = f'did you mean "{near[0]}"?' if near else f"presets: {', '.join(names)}"
    raise UserError(f"the config {source}", "no such file, and no preset of that name", hint)


def free_engine(values: dict[str, Any]) -> None:
    """Let the planner choose what a file says of it; what else [engine] holds stays, as it moves numbers."""
    engine = values.get("engine")
    kept = (
        {key: value for key, value in engine.items() if key not in PLANNED}
        if isinstance(engine, dict)
        else {}
    )
    values["engine"] = {**kept, "auto": True}
    values.pop("micro_batch_size", None)


def key_of(override: str) -> str:
    """The key of a `key=value`."""
    return override.partition("=")[0].strip()


def beside(overrides: Iterable[str], keys: Iterable[str]) -> list[str]:
    """The overrides of what none of the keys sets: neither a setting itself, nor a table around it."""
    set_there = tuple(f"{key}." for key in keys)
    return [word for word in overrides if not f"{key_of(word)}.".startswith(set_there)]


def check_once(overrides: Sequence[str]) -> None:
    """Raise UserError where a key comes twice in a row, as a shell writes out a pattern with braces.

    What programs put behind a user's overrides, such as a sweep the name of each run, wins.
    """
    for one, other in itertools.pairwise(overrides):
        if key_of(one) == key_of(other):
            do = "give it once; a pattern with braces stands in quotes: 'data.source=shards/{000..099}.tar'"
            raise UserError(f"the overrides {one} and {other}", f"they set {key_of(one)} twice", do)


def as_table(name: str, value: Any) -> Any:
    """The table that a setting's value stands for, where it is a short form of one; else the value."""
    if name in KINDS and isinstance(value, str):
        return {"kind": value}
    if name in SWITCHED and value is True:
        return {}
    return {"auto": True} if name == "engine" and value == "auto" else value


def check_text(text: str, asked: str) -> None:
    """Raise UserError for half a letter, such as Python makes of a command line's bytes not in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(asked, "it is not valid Unicode text", "write it in UTF-8") from None


def set_value(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` to nested tables; the value is TOML, or a plain string."""
    check_text(override, f"the override {override!r}")
    _, equals, text = override.partition("=")
    if not equals or not key_of(override):
        raise UserError(f"the override {override!r}", "it has no key=value form", "write for example seed=7")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, leaf = key_of(override).split(".")
    for table in tables:
        values[table] = as_table(table, values.get(table, {}))
        values = values[table]
        if not isinstance(values, dict):
            raise UserError(
                f"the override {override!r}", f'"{table}" holds a value, not a table', "name a setting"
            )
    values[leaf] = value


def parse(values: dict[str, Any], where: str = "the config") -> Config:
    """Turn nested dictionaries into a Config, or raise one UserError that lists every mistake."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [describe(problem) for problem in error.errors()]
    raise UserError(
        where, "\n       ".join(lines), "correct these settings; docs/config.md lists them all"
    ) from None


def describe(problem: Any) -> str:
    """One line for one of pydantic's problems, naming the setting as the user writes it."""
    place = [str(part) for part in problem["loc"]]
    # Where a kind decides, pydantic names it besides: method.lora.rank is the user's method.rank.
    said = [word for before, word in zip(["", *place], place, strict=False) if before not in KINDS]
    setting = ".".join(said) or "the file"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], known_keys(place[:-1]), 1, cutoff=0.5)
        return f"unknown key {setting}" + (
            f"; did you mean {'.'.join([*said[:-1], near[0]])}?" if near else ""
        )
    if problem["type"] == "missing":
        return f"{setting} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "string_pattern_mismatch":
        message = SPELT.get(said[-1], message)
    return message if problem["type"] == "value_error" else f"{setting} = {problem['input']!r}: {message}"


def known_keys(tables: Sequence[str]) -> list[str]:
    """The keys that may stand in a table, named by its path; [] where anything may."""
    section: type[BaseModel] = Config
    words = list(tables)
    while words:
        field = section.model_fields.get(words.pop(0))
        several = tables_of(field.annotation) if field is not None else []
        if len(several) > 1 and words:  # pydantic names the kind after the setting: method.lora.rank
            kind = words.pop(0)
            several = [table for table in several if kind in get_args(table.model_fields["kind"].annotation)]
        if words and words[0].isdigit():
            words.pop(0)
        if len(several) != 1:
            return []
        section = several[0]
    return list(section.model_fields)


def tables_of(annotation: Any) -> list[type[BaseModel]]:
    """The tables that a setting may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for part in get_args(annotation) for table in tables_of(part)]
