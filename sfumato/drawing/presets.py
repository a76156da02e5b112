"""Ready-made drawings: TOML files whose [sample] table is what `sfumato sample` is told. Imports no torch."""

import argparse
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.config import PRESETS
from sfumato.errors import UserError

TABLE = "sample"


def find(model: str) -> Path | None:
    """The file of a drawing preset that stands in the place of MODEL; None if it is none."""
    path = Path(model)
    if path.is_dir():
        return None
    file = path if path.suffix == ".toml" else PRESETS / f"{model}.toml"
    return file if file.is_file() else None


def defaults(file: Path, command: argparse.ArgumentParser) -> dict[str, Any]:
    """The options that a preset sets, by their names in the parser of `sample`.

    Keys are the options without dashes: control_scale is --control-scale. Raises UserError with what is
    wrong in the file.
    """
    asked = f"the drawing preset {file}"
    try:
        said = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(asked, f"it is not valid TOML: {error}", "mend that line") from None
    if set(said) != {TABLE}:
        do = f"begin it with [{TABLE}]; what trains is run by `sfumato train {file.stem}`"
        raise UserError(asked, f"it has the tables and keys {', '.join(said) or 'none'}", do)
    actions = {
        word: a
        for a in command._actions
        for word in names(a)
        if word not in ("help", "gpus", "model") or not a.option_strings
    }
    found: dict[str, Any] = {}
    for key, value in said[TABLE].items():
        if key not in actions:
            near = difflib.get_close_matches(key, actions, 1, 0.5)
            raise UserError(
                asked,
                f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""),
                f"keys: {', '.join(sorted(actions))}",
            )
        found[actions[key].dest] = taken(asked, key, value, actions[key])
    if not found.get("model"):
        raise UserError(asked, "it names no model", f'give [{TABLE}] a model = "..."')
    return found


def names(action: argparse.Action) -> list[str]:
    """What an option is called in a preset."""
    if not action.option_strings:
        return [action.dest]
    words = [word.removeprefix("--").replace("-", "_") for word in action.option_strings if word[:2] == "--"]
    return ["prompts_file"] if words == ["prompts"] else words


def taken(asked: str, key: str, value: Any, action: argparse.Action) -> Any:
    """A value as the command line would have given it. Raises UserError if it would not take it."""
    several = isinstance(action, argparse._AppendAction) or action.nargs in ("*", "+")
    if action.nargs == 0 or isinstance(value, list) != several or isinstance(value, Mapping):
        if action.nargs == 0 and isinstance(value, bool):
            return value
        kind = "true or false" if action.nargs == 0 else "a list" if several else "one value"
        raise UserError(asked, f"{key} = {value!r}", f"give {kind}")
    words = [one(asked, key, word, action) for word in (value if several else [value])]
    return words if several else words[0]


def one(asked: str, key: str, word: Any, action: argparse.Action) -> Any:
    """A single value."""
    kind: Any = action.type or str
    try:
        value = kind(str(word))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UserError(asked, f"{key} = {word!r}: {error}", "correct it") from None
    if action.choices is not None and value not in action.choices:
        raise UserError(asked, f"{key} = {word!r}", f"choose {', '.join(map(str, action.choices))}")
    return value
