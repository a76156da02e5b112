"""The environment variables that matter: what a run records, and the page docs/environment.md.

    python -m sfumato.variables > docs/environment.md

They stand in variables.toml.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# glibc gives large blocks back to the system after every step; to keep them is 3 to 6 times as fast on a CPU.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Variable:
    """One variable: what it is where it is left alone, what it does, and when to change it."""

    name: str
    default: str
    what: str


@dataclass(frozen=True)
class Group:
    """Variables of one library; every other that begins with one of `prefixes` is recorded as well."""

    title: str
    about: str
    prefixes: tuple[str, ...]
    variables: tuple[Variable, ...]


@cache
def groups() -> tuple[Group, ...]:
    """The table."""
    read = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["group"]
    return tuple(
        Group(
            part["title"],
            part.get("about", ""),
            tuple(part.get("prefixes", ())),
            tuple(Variable(**each) for each in part["variables"]),
        )
        for part in read
    )


def known() -> dict[str, Variable]:
    """Every variable of the table by its name."""
    return {each.name: each for group in groups() for each in group.variables}


HEAD = """# Environment variables

Written from `sfumato/variables.toml` by `python -m sfumato.variables > docs/environment.md`; a test compares
the two.

A run carries its own variables. What stands in the table `[environment]` of a config every rank gets before
torch starts, however it was started: by `--gpus N`, as one process, or by torchrun, deepspeed, mpirun or
srun, where a rank begins anew once, under its process id.

```toml
[environment]
NCCL_DEBUG = "INFO"
HCCL_CONNECT_TIMEOUT = 1200
```

On the command line: `sfumato train sdxl-lora environment.NCCL_DEBUG=INFO`.

- The config's value wins over the shell's, and the shell's over what Sfumato sets for speed.
- A value is text or a number. A switch is written in quotes, in its program's own words: NCCL reads "1", and
  "true" means nothing to it.
- It may change between two starts of one run; the start that goes on says so.
- What tells a rank its place (RANK, MASTER_ADDR, SLURM_ and so on) is the launcher's, and secrets are the
  shell's: both are refused.

The table itself is kept in the run's `resolved.json`. `environment.json` keeps what the first rank found:
every variable of this page that was set, with its value, others of the same libraries (by the beginnings of
their names), and all that the config names. Nothing that looks like a secret is written (names that end in
TOKEN or KEY, or hold SECRET or PASSWORD; addresses with a login). `sfumato doctor` shows what is set, by
whom, and what for.
"""


def page() -> str:
    """docs/environment.md."""
    return HEAD + "".join(chapter(group) for group in groups())


def chapter(group: Group) -> str:
    """One library's variables as Markdown."""
    rows = "".join(f"| `{each.name}` | {each.default} | {each.what} |\n" for each in group.variables)
    others = ", ".join(f"`{prefix}`" for prefix in group.prefixes)
    about = f"{group.about}\n\n" if group.about else ""
    more = f"\nRecorded besides, where set: what begins with {others}.\n" if others else ""
    columns = "| variable | left alone | what, and when to change it |\n|---|---|---|\n"
    return f"\n## {group.title}\n\n{about}{columns}{rows}{more}"


def recorded(env: Mapping[str, str], besides: Mapping[str, str]) -> dict[str, str]:
    """What of an environment a run keeps: the page's variables, and those of `besides`; never a secret."""
    return dict(sorted(_recorded(env, besides)))


def _recorded(env: Mapping[str, str], besides: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    from sfumato.config.environment import LOGIN, SECRET  # with all of the config: not for every process

    names = known().keys() | besides.keys()
    prefixes = tuple(prefix for group in groups() for prefix in group.prefixes)
    for name, value in env.items():
        wanted = name in names or name.startswith(prefixes)
        if wanted and not SECRET.search(name) and not LOGIN.search(value):
            yield name, value


if __name__ == "__main__":
    print(page(), end="")
