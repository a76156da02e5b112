"""What of a run others may read: settings without this machine's paths, and texts that steer nothing.

A path is told by its last part, and an address by what stands behind its last slash.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.models.hub import is_hub_id

BARE = re.compile(r"[A-Za-z0-9_-]+")
"""What TOML takes as a key without quotes."""
WORDS = ("prompt", "prompts", "word", "like", "caption_prefix", "caption_suffix", "separator", "targets")
"""Settings that are texts, whatever they begin with."""
PLACES = ("weights", "vae", "source", "conditions", "output", "store")
"""Settings that say where something lies."""
ELSEWHERE = re.compile(r"[/~\\]|\.\.?/|[A-Za-z]:\\|\w+://")
"""How other settings begin that do so."""


def settings(config: Config) -> Iterator[tuple[str, Any]]:
    """Every setting that is not the usual one, by its dotted name, without what is this machine's."""
    for name, value in flat(config.model_dump(mode="json", exclude_defaults=True, exclude={"environment"})):
        yield name, shared(value, name)


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted names."""
    for key, value in table.items():
        if isinstance(value, dict) and value and BARE.fullmatch(key):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + (key if BARE.fullmatch(key) else json.dumps(key)), value


def shared(value: Any, name: str) -> Any:
    """A setting's value as others may read it."""
    if isinstance(value, dict):
        return {key: shared(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [shared(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    leaf = name.rpartition(".")[2]
    return short(value) if leaf in PLACES or (leaf not in WORDS and ELSEWHERE.match(value)) else value


def short(place: str) -> str:
    """A place without what lies above it on this machine; a hub id as it is."""
    if on_hub(place):
        return place
    return re.split(r"[/\\]", place.split("?")[0].rstrip("/\\"))[-1] or "folder"


def on_hub(place: str) -> bool:
    """Whether a place is a hub id, and no folder here."""
    return is_hub_id(place) and not Path(place).exists()


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the pairs that stand for letters beyond 16 bits.
        text = json.dumps(value, ensure_ascii=False)
        return "".join(letter if shows(letter) else f"\\U{ord(letter):08x}" for letter in text)
    return str(value)


def shows(letter: str) -> bool:
    """Whether a letter can be seen where it stands: none that steers, or turns the line's direction."""
    return not unicodedata.category(letter).startswith("C") and letter not in "\u2028\u2029"


def clean(text: str) -> str:
    """A user's text in one line, without what cannot be seen."""
    return " ".join("".join(letter if shows(letter) or letter.isspace() else "" for letter in text).split())


def plain(text: str) -> str:
    """A user's text that Markdown, HTML and tables leave as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()|~$&:@!])", r"\\\1", clean(text))


def literal(text: str) -> str:
    """A user's text as code; as plain text where it holds marks that would end it."""
    text = clean(text)
    return plain(text) if "`" in text or "|" in text or not text else f"`{text}`"
