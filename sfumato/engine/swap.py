"""The optimizer's fp32 weights, states and averages on a disk: brought to memory in turn, and put back.

DeepSpeed steps one sub-group of stage 3 after the other: it reads the group's files, steps, and writes them
(ZeRO-Infinity, arXiv:2104.07857). What reads or writes weights between steps brings each group in the same
way. Groups below a megabyte stay in memory. Written for DeepSpeed 0.19.8, as shards.py is.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from sfumato.config import Config

PREFIX = "sfumato-swap-"
PATIENCE = 10.0
"""Seconds in which a lock that another start looks at becomes free."""


@contextlib.contextmanager
def brought(engine: Any, group: int, writing: bool = False) -> Iterator[None]:
    """Within it a sub-group's masters and states are in memory; nothing happens where they always are.

    engine: DeepSpeed's, at stage 3, between two steps. writing: put them back as they are then; without it
    the files stay what they were.
    """
    zero = engine.optimizer
    if not zero._swappable_optimizer_subgroup(group):
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    finally:
        # In this order: what is registered is written.
        if register(zero, zero.fp32_partitioned_groups_flat[group]) or writing:
            zero._optimizer_states_and_gradient_swap_out(group)
        else:
            zero._release_swap_buffers(group)


def register(zero: Any, flat: Any) -> bool:
    """Have the present states of a group move with it, and no others; whether some of them are new.

    DeepSpeed looks once, after the first step; an average may begin later, and a checkpoint may lack one.
    """
    swapper = zero.optimizer_swapper
    known = swapper.swap_params_info[flat.ds_id]
    states = swapper._get_state_tensors(flat)
    kept = [place for place in known.tensors[1:] if any(place.compute_tensor is state for state in states)]
    new = [state for state in states if all(place.compute_tensor is not state for place in kept)]
    known.tensors[1:] = kept
    if new:
        known.add_state_tensors(new)
    return bool(new)


def prepare(engine: Any, states: Sequence[str]) -> None:
    """Have gradients stay in memory, and room taken on the disk for all that a run writes there.

    engine: DeepSpeed's, new. states: what is kept of a weight beside itself. OSError where there is no room.
    """
    zero = engine.optimizer
    if not zero.swap_optimizer:
        return
    # DeepSpeed 0.19.8 reads a gradient into the middle of a buffer, where the disk takes no address that is
    # not a multiple of 512, and never hears of the error: it would step with what lay in the buffer.
    # `shards.settle_gradients` hands over those that are in memory anyway.
    zero.optimizer_swapper.swap_out_gradients = lambda **ignored: None
    for path, size in files(zero, states):
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def files(zero: Any, states: Sequence[str]) -> Iterator[tuple[Path, int]]:
    """The files of this rank's groups, and their bytes."""
    swapper = zero.optimizer_swapper
    for known in swapper.swap_params_info.values():
        weights = Path(known.tensors[0].swap_path)
        size = swapper._io_aligned_numel(known.numel()) * swapper.swap_element_size
        yield weights, size
        yield from ((weights.with_name(f"{state}-{weights.name}"), size) for state in states)


def hand_over(zero: Any, group: int, start: int, gradient: torch.Tensor) -> bool:
    """Have a group's step take a gradient from memory; whether it is one that waits on a disk.

    start: the gradient's first element in the group.
    """
    if not zero._swappable_optimizer_subgroup(group):
        return False
    flat = zero.fp32_partitioned_groups_flat[group]
    zero.optimizer_swapper.swap_params_info[flat.ds_id].unswapped_gradients[start] = gradient
    return True


class Folder:
    """A folder of this process's own on the disk of `engine.nvme_path`, gone with its owner.

    A lock of the system's tells those of the living from what a crash has left; the next start on this
    machine removes the latter.
    """

    OWN: set[str] = set()
    """Names of this process's folders: opening the lock of one of them a second time would lift it."""

    def __init__(self, place: Path, owner: object) -> None:
        """Make it, after the leftovers of the dead are removed. OSError where that cannot be."""
        clean(place)
        name = f"{PREFIX}{socket.gethostname()}-{os.getpid()}-{len(self.OWN)}"
        self.path = place.absolute() / name
        self.OWN.add(name)
        lock = lock_of(self.path)
        file = locked(lock)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        self.remove = weakref.finalize(owner, drop, self.path, file, os.getpid())
        """Called when the owner goes, and at the end of the process."""


def locked(path: Path) -> IO[str]:
    """The file, made and locked. OSError where that cannot be within some seconds."""
    end = time.monotonic() + PATIENCE
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another start may have taken it for a leftover and removed it before it was locked.
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except (BlockingIOError, FileNotFoundError):
            if time.monotonic() > end:
                raise
        file.close()
        time.sleep(0.05)


def drop(path: Path, file: IO[str], process: int) -> None:
    """Remove a folder and its lock, in the process that made them."""
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)
        lock_of(path).unlink(missing_ok=True)
        file.close()


def clean(place: Path) -> None:
    """Remove the folders of processes of this machine that have died."""
    for lock in place.glob(f"{PREFIX}{socket.gethostname()}-*.lock"):
        if lock.stem in Folder.OWN:
            continue
        with contextlib.suppress(OSError), lock.open("a+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where its owner lives
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()


def probe(place: Path) -> None:
    """Write and read past the system's cache, at half the addresses' usual unit. OSError where that fails."""
    unit = 1024
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as memory, tempfile.NamedTemporaryFile(dir=place) as file:
        direct = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, direct)
            view = stack.enter_context(memoryview(memory))
            memory[:unit] = secret = os.urandom(unit)
            with view[:unit] as source, view[unit : 2 * unit] as target:
                if os.writev(direct, [source]) != unit or os.preadv(direct, [target], 0) != unit:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                if target.tobytes() != secret:
                    raise OSError(errno.EIO, "it gave back other numbers")


def lock(size: int) -> None:
    """Lock so many bytes of memory, and let them go. OSError where this process may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(ValueError, OSError):
        most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    with mmap.mmap(-1, size) as memory:
        start = ctypes.c_char.from_buffer(memory)
        failed = libc.mlock(ctypes.byref(start), ctypes.c_size_t(size))
        del start  # or the map would not close
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def lock_of(folder: Path) -> Path:
    """The lock that stands beside a folder."""
    return folder.with_name(f"{folder.name}.lock")


def folder_of(config: Config, owner: object) -> Folder | None:
    """A new folder for what a run's process keeps on a disk; None where nothing is kept there."""
    if config.engine.offload_optimizer != "nvme":
        return None
    assert config.engine.nvme_path is not None, "the check lets no such run start"
    return Folder(config.engine.nvme_path, owner)
