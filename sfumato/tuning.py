"""The environment of every rank: the run's own `[environment]`, and what makes a process on a CPU fast.

Both must stand before the process starts: glibc reads its settings then, and torch when it is imported.
"""

import gc
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.variables import ALLOCATOR, known

DONE = "SFUMATO_TUNED"
"""Where a process finds what was done for it: `Mark`."""
DEVICES = ("dev/nvidia0", "dev/kfd", "dev/davinci0", "dev/accel", "dev/dri/renderD128", "dev/dxg")
BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Linux's words for a CPU's arithmetic in bf16: Intel's, then AMD's too, then Arm's."""
EMPTY: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Mark:
    """Names of variables that we set, those that a config set, and a hash of what that config says."""

    ours: Sequence[str] = ()
    config: Sequence[str] = ()
    hash: str = ""

    @staticmethod
    def read(env: Mapping[str, str]) -> "Mark":
        """The mark of an environment; one of nothing where there is none."""
        ours, config, hash = [*env.get(DONE, "").split(";"), "", "", ""][:3]
        return Mark([*filter(None, ours.split(","))], [*filter(None, config.split(","))], hash)

    def __str__(self) -> str:
        return ";".join([",".join(self.ours), ",".join(self.config), self.hash])


@dataclass(frozen=True)
class Setting:
    """One variable as `sfumato doctor` tells it: `value` is None where it is unset.

    who: "sfumato", "config", "you" (the shell, or what started it), or "nobody".
    """

    name: str
    value: str | None
    who: str
    why: str


def has_accelerator(env: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether this machine seems to have one, by its device files: a guess that costs no import of torch."""
    named = env.get("DS_ACCELERATOR")
    return named != "cpu" if named else any((root / device).exists() for device in DEVICES)


def has_bf16(known: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU computes in bf16: others turn it into fp32 and back, which takes longer.

    Read off what Linux says of it, which costs no import of torch; true where nothing is said.
    """
    if not known.exists():
        return True
    return not set(BF16).isdisjoint(known.read_text().split())


def missing(env: Mapping[str, str], ranks: int) -> dict[str, str]:
    """What `env` lacks for one of `ranks` processes on this machine; what the user has set stays."""
    wanted = {} if has_accelerator(env) else dict(ALLOCATOR)
    if ranks > 1:
        wanted["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    return {name: value for name, value in wanted.items() if name not in env}


def given(env: Mapping[str, str], ranks: int, environment: Mapping[str, str] = EMPTY) -> dict[str, str]:
    """The environment of one of `ranks` processes here: `env`, over it a config's, and what both lack."""
    whole = {**env, **environment}
    lacking = missing(whole, ranks)
    before = [name for name in Mark.read(env).ours if name in env and name not in environment]
    mark = Mark([*dict.fromkeys([*before, *lacking])], [*environment], hashed(environment))
    return whole | lacking | {DONE: str(mark)}


def hashed(environment: Mapping[str, str]) -> str:
    """A short name of what a config says."""
    return hashlib.sha256(json.dumps(sorted(environment.items())).encode()).hexdigest()[:16]


def unneeded(method: Any) -> Sequence[str]:
    """Packages that a process of its own goes without, by the config's table [method]; None: no config.

    bitsandbytes: peft imports it where it is there, used or not, which takes as long as torch itself.
    """
    return () if getattr(method, "base_bits", None) else ("bitsandbytes",)


@contextmanager
def importing(without: Sequence[str] = ()) -> Iterator[None]:
    """Around imports of torch and what stands on it: a sixth of their time goes to the garbage collector.

    It finds nothing there, and need not look through what they made at any later time.

    without: packages that this process does as if they were not installed, such as `unneeded`.
    """
    known: dict[str, Any] = {
        **dict.fromkeys(without),
        **sys.modules,
    }  # None is Python's sign of what is not there
    sys.modules |= known
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def restart(environment: Mapping[str, str] = EMPTY) -> None:
    """Begin this very command anew with its environment, once, in the same process: the id stays.

    For a single process and for a rank that others started; one of our supervisor's has it from the start.
    Nothing happens where nothing is missing, and where it was done already.
    """
    if DONE in os.environ and Mark.read(os.environ).hash == hashed(environment):
        return
    wanted = given(os.environ, 1, environment)
    if any(os.environ.get(name) != value for name, value in wanted.items() if name != DONE):
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def report(env: Mapping[str, str]) -> list[Setting]:
    """Every variable of docs/environment.md that is set, and those for a CPU's speed where they are not, too.

    env: a rank's, such as `given` makes it.
    """
    mark, table = Mark.read(env), known()
    names = [name for name in (*table, *mark.config) if name in env and name != DONE]
    names += [name for name in (*ALLOCATOR, "OMP_NUM_THREADS") if name not in env]
    return [
        Setting(name, env.get(name), who(name, env, mark), table[name].what if name in table else "")
        for name in dict.fromkeys(names)
    ]


def who(name: str, env: Mapping[str, str], mark: Mark) -> str:
    """Who set a variable."""
    if name not in env:
        return "nobody"
    return "config" if name in mark.config else "sfumato" if name in mark.ours else "you"
