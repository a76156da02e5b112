"""The page of all settings, written from config/: `python -m sfumato.reference > docs/config.md`."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sfumato.config import Config, Section

HEAD = """# Every setting

Written from `sfumato/config/` by `python -m sfumato.reference > docs/config.md`; a test compares the two.
A setting in a table is written `table.key=value` on the command line. A kind alone may stand for its table:
`objective.weight = "min_snr"` is `objective.weight = { kind = "min_snr" }`.
"""
COLUMNS = "| key | default | values | what |\n|---|---|---|---|\n"


def page() -> str:
    """docs/config.md."""
    return HEAD + "".join(chapter(Config, ""))


def chapter(section: type[BaseModel], path: str, title: str = "") -> Iterator[str]:
    """The settings of one table as lines of Markdown, then its inner tables."""
    about = (section.__doc__ or "").strip()
    yield f"\n## {title or 'Top of the file'}\n\n{about}\n\n{COLUMNS}"
    inner: list[tuple[str, type[BaseModel], str]] = []
    for name, field in section.model_fields.items():
        below = f"{path}.{name}" if path else name
        tables = sections(field.annotation)
        several = get_origin(field.annotation) is tuple
        inner += [(below, table, f"[[{below}]]" if several else f"[{below}]") for table in tables]
        if not tables or len(tables) > 1:
            cells = (
                f"`{name}`",
                default(field),
                kind(field, tables),
                " ".join((field.description or "").split()),
            )
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    for below, table, heading in inner:
        yield from chapter(table, below, heading)


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The tables that a setting may be: none for a plain value, several where a kind decides."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [table for part in get_args(annotation) for table in sections(part)]


def default(field: FieldInfo) -> str:
    """A default as TOML would say it."""
    value = field.default
    if value is PydanticUndefined:
        return "**needed**"
    if value is None:
        return "unset"
    if isinstance(value, BaseModel):
        return f'`"{value.kind}"`' if hasattr(value, "kind") else ""
    return f"`{toml(value)}`"


def toml(value: Any) -> str:
    """A plain value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{}"
    return str(value) if isinstance(value, (int, float)) else f'"{value}"'


def kind(field: FieldInfo, tables: list[type[BaseModel]]) -> str:
    """What values a setting takes."""
    if tables:
        return " or ".join(
            f'"{word}"' for table in tables for word in get_args(table.model_fields["kind"].annotation)
        )
    limits = [str(limit) for limit in (limited(part) for part in field.metadata) if limit]
    return ", ".join([type_name(field.annotation), *limits])


def limited(constraint: Any) -> str:
    """One of pydantic's bounds in words."""
    for name, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if hasattr(constraint, name):
            return f"{words} {getattr(constraint, name)}"
    return ""


def type_name(annotation: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(toml(word) for word in parts)
    if origin in (Union, UnionType):
        return " or ".join(type_name(part) for part in parts if part is not type(None))
    if origin is Annotated:
        return type_name(parts[0])
    if origin is tuple:
        return f"list of {type_name(parts[0])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, "path" if getattr(annotation, "__name__", "") == "Path" else "table")


if __name__ == "__main__":
    print(page(), end="")
