"""DeepSpeed's reader of disks, which is compiled on the machine once: whether it can be, and its loading."""

import importlib.util
import os
import shutil
import time
from pathlib import Path
from typing import Any

from sfumato.device import accelerator
from sfumato.errors import UserError

PARTS = ("pin_memory", "async_io")
"""What is compiled: ten minutes of one core, in all."""
STILL = 600.0
"""Seconds without a change after which nothing is being compiled any more; a file takes a minute or two."""


def place_of(part: str) -> Path:
    """Where torch compiles it."""
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(part, False))


def is_there() -> bool:
    """Whether it is compiled for this torch, or came so with DeepSpeed (DS_BUILD_AIO=1)."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get("async_io")) or all(is_ours(part) for part in PARTS)


def is_ours(part: str) -> bool:
    """Whether a part is compiled, and for the torch of this environment; for another it is compiled again."""
    import torch

    place = place_of(part)
    library, recipe = place / f"{part}.so", place / "build.ninja"
    try:
        newer = library.stat().st_mtime >= recipe.stat().st_mtime
        return newer and str(Path(torch.__file__).parent) in recipe.read_text(encoding="utf-8")
    except OSError:
        return False


def stale_lock() -> Path | None:
    """The lock of a compilation that was ended by force: torch waits for it for ever."""
    for part in PARTS:
        place = place_of(part)
        lock = place / "lock"
        if lock.exists() and time.time() - changed(place) > STILL:
            return lock
    return None


def changed(place: Path) -> float:
    """When something last changed in a folder, unix seconds."""
    times = [place.stat().st_mtime]
    for path in place.iterdir():
        if path.exists():  # the compiler's own files come and go
            times.append(path.stat().st_mtime)
    return max(times)


def lacking() -> str | None:
    """What has to be installed before it can be compiled; None where nothing is, or it is compiled."""
    from torch.utils import cpp_extension

    if is_there():
        return None
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "a compiler for C++"
    if not cpp_extension.is_ninja_available():
        beside = " on the PATH" if importlib.util.find_spec("ninja") else ""
        return f"the program ninja{beside}"
    if not builder().is_compatible(verbose=False):
        return "the headers of libaio"
    return None


def builder() -> Any:
    """DeepSpeed's, for the device of this process."""
    return accelerator().create_op_builder("AsyncIOBuilder")


def load() -> None:
    """Load it, compiled before if need be, which takes some minutes. UserError if that fails."""
    if not is_there():
        print(
            "DeepSpeed's reader of disks is compiled, once on this machine; that takes some minutes",
            flush=True,
        )
    while any((place_of(part) / "lock").exists() for part in PARTS):
        if lock := stale_lock():
            raise UserError(
                "to load DeepSpeed's reader of disks",
                f"{lock} says that a process compiles it, but nothing moves beside it",
                "see that no process compiles there, and remove that file",
            )
        time.sleep(0.2)
    try:
        builder().load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        raise UserError(
            "to compile DeepSpeed's reader of disks",
            f"that failed: {str(error)[-2000:]}",
            'mend that, or set engine.offload_optimizer = "cpu"',
        ) from error
