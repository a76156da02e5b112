"""The families that there are, read from their source, so that torch is not imported.

A family is a file of this folder that ends in `FAMILY = ...`; its class says `pipeline = SomePipeline` and
`needs = ("tokenizer", ...)`.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sfumato.errors import UserError


@dataclass(frozen=True)
class Entry:
    """What is known of a family without importing it."""

    name: str
    pipeline: str
    """The pipeline's class name."""
    needs: tuple[str, ...]
    """The folders that it reads besides the denoiser's, the VAE's and the scheduler's."""


@lru_cache
def entries() -> tuple[Entry, ...]:
    """The families of this folder, by name."""
    found = []
    for file in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        family = dict(bindings(tree.body)).get("FAMILY")
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        if isinstance(family, ast.Name) and family.id in classes:
            says = dict(bindings(classes[family.id].body))
            assert {"pipeline", "needs"} <= says.keys(), (
                f"{file.name}: {family.id} says no pipeline or no needs"
            )
            found.append(
                Entry(file.stem, ast.unparse(says["pipeline"]), tuple(ast.literal_eval(says["needs"])))
            )
    return tuple(found)


def bindings(statements: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """Name and value of every plain assignment."""
    for statement in statements:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    yield target.id, statement.value


def families() -> list[str]:
    """The names that `model.family` can have, besides dotted paths."""
    return [entry.name for entry in entries()]


def which_family(folder: Path, pipeline: str, asked: str | None) -> tuple[str, tuple[str, ...]]:
    """A pipeline's family and what it needs; UserError if there is none or the config names another."""
    if asked is not None and "." in asked:  # a family outside this folder checks all this when it is loaded
        return asked, ()
    if asked is not None and asked not in families():
        raise UserError(f"model.family = {asked!r}", "no such family", f"families: {', '.join(families())}")
    entry = next((entry for entry in entries() if entry.pipeline == pipeline), None)
    if entry is None:
        known = ", ".join(f"{entry.name} ({entry.pipeline})" for entry in entries())
        raise UserError(f"training {folder}", f"it holds a {pipeline}", f"use weights of a family: {known}")
    if asked not in (None, entry.name):
        do = f'remove model.family, or set it to "{entry.name}"'
        raise UserError(f"model.family = {asked!r}", f"{folder} holds a {pipeline}", do)
    return entry.name, entry.needs
