"""The runs of a sweep: every combination of the values, each with a name of its own."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from sfumato import config
from sfumato.config import Config
from sfumato.errors import UserError

LARGEST = 1000
"""Runs of one array: Slurm's own bound is 1001 where nobody has set another."""
LONGEST = 100
"""Characters of a name that is made of values; a longer one ends in its number instead."""
PAIRS = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Run:
    """One run: its config, and the settings that make it so, beside those that all have."""

    config: Config
    settings: Sequence[str] = ()


def runs(source: str, overrides: Sequence[str], sweeps: Sequence[str], world: int) -> list[Run]:
    """Every run, each one's config checked; one without sweeps. world: ranks of each.

    Raises UserError for a config that cannot be, naming the values that make it so.
    """
    base = config.load(source, overrides)
    base.accumulation(world)
    if not sweeps:
        return [Run(base)]
    axes = [axis(text) for text in sweeps]
    keys = [key for key, _ in axes]
    for key in {"name"} & set(keys) | {key for key in keys if keys.count(key) > 1}:
        wrong = "each run of a sweep gets its own" if key == "name" else "it is there twice"
        raise UserError(f"--sweep {key}=...", wrong, "leave it out")
    number = prod(len(values) for _, values in axes)
    if number > LARGEST:
        asked = " ".join(f"--sweep {text}" for text in sweeps)
        raise UserError(asked, f"{number:,} runs, and an array holds {LARGEST:,}", "sweep less")
    combinations = list(itertools.product(*(values for _, values in axes)))
    names = named(base.name, keys, combinations)
    found = []
    for name, values in zip(names, combinations, strict=True):
        settings = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        settings.append(f"name={name}")
        try:
            made = config.load(source, [*beside(overrides, sweeps), *settings])
            made.accumulation(world)
        except UserError as error:
            asked = f"--sweep with {' '.join(settings[:-1])}: {error.asked}"
            raise UserError(asked, error.found, error.do) from None
        found.append(Run(made, settings))
    return found


def beside(overrides: Sequence[str], sweeps: Sequence[str]) -> list[str]:
    """The overrides of what no sweep sets: its values take the place of the others."""
    return config.beside(overrides, (axis(text)[0] for text in sweeps))


def axis(text: str) -> tuple[str, list[str]]:
    """The setting and the values of one --sweep. Raises UserError if there are none."""
    key, _, rest = text.partition("=")
    values = [value.strip() for value in split(rest)]
    if not key.strip() or not all(values):
        raise UserError(f"--sweep {text}", "a setting and its values are not there", "write seed=0,1,2")
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"--sweep {text}", f"{twice[0]} is there twice", "name each value once")
    return key.strip(), values


def split(text: str) -> list[str]:
    """Its parts between commas, but for commas in quotes, lists and tables of TOML."""
    parts, closing, quoted, escaped = [""], "", "", False
    for letter in text:
        if quoted:
            quoted = "" if letter == quoted and not escaped else quoted
            escaped = letter == "\\" and quoted == '"' and not escaped
        elif letter in PAIRS:
            closing = PAIRS[letter] + closing
        elif closing.startswith(letter):
            closing = closing[1:]
        elif letter == '"' or (letter == "'" and not parts[-1].strip("[{ ")):
            quoted = letter  # an apostrophe within a word is one
        elif letter == "," and not closing:
            parts.append("")
            continue
        parts[-1] += letter
    return parts


def named(name: str, keys: Sequence[str], combinations: Sequence[Sequence[str]]) -> list[str]:
    """A name for each combination, all different: run-lr-1e-5-seed-0."""
    leaves = [key.rpartition(".")[2] for key in keys]
    leaves = leaves if len(set(leaves)) == len(leaves) else list(keys)
    found = []
    for values in combinations:
        words = [f"{leaf}-{value}" for leaf, value in zip(leaves, values, strict=True)]
        found.append(re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join([name, *words])).rstrip("_"))
    if len({word.casefold() for word in found}) < len(found) or any(len(word) > LONGEST for word in found):
        return [f"{name}-{number}" for number in range(len(found))]
    return found
