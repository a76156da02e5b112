"""Batches for the training loop, made ahead of time by worker processes.

What a batch holds depends on (data, config, step) alone: not on the number of workers or ranks, nor on
where a run was resumed.
"""

import atexit
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from math import ceil
from multiprocessing import active_children
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from sfumato.config import Config
from sfumato.data.batch import Batch, Fault
from sfumato.data.buckets import Cells
from sfumato.data.cached import Cached
from sfumato.data.halves import Halves, shares
from sfumato.data.index import Index
from sfumato.data.order import Order, slice_of
from sfumato.data.packed import Packed, packed
from sfumato.data.samples import Samples, Wanted
from sfumato.device import kind
from sfumato.errors import UserError

STUCK = 5.0  # seconds for a killed worker to be gone
UNREAD = (
    "see whether the files can be read in time and whether memory is short; data.worker_timeout is the time "
    "allowed in seconds, data.workers = 0 loads in the training process"
)
MOST_AHEAD = 64  # micro-batches made ahead; each waits as an open file, and in memory


class Loader:
    """The micro-batches of one rank, from any step on."""

    def __init__(
        self,
        config: Config,
        index: Index,
        cells: Cells,
        latent_channels: int,
        vae_factor: int,
        cached: Cached | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Raises UserError where the batch cannot be cut into equal micro-batches for all ranks."""
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.config, self.index, self.rank, self.world = config, index, rank, world
        self.accumulation = config.accumulation(world)
        repeats = [part.repeats for part in index.parts]
        asked = cells.counts, repeats, config.batch_size, config.seed
        self.order = Order(*asked) if index.prior is None else Halves(*asked, index.prior)
        assert (config.data.prior is None) == (index.prior is None), "the index is of other data"
        self.samples = Samples(config, index, cells, latent_channels, vae_factor, cached)
        self.list = config.folder / "faults" / f"rank-{rank}.jsonl"
        self.faults = set(read_faults(self.list))

    @property
    def bad(self) -> int:
        """Records known to be unusable: those of the index, and those that this rank came upon."""
        return int(self.index.facts["faults"]) + len(self.faults)

    def places(self, step: int) -> Iterator[tuple[int, int]]:
        """Step and number of every micro-batch of this rank, from a step on, without end."""
        for later in count(step):
            for micro in range(self.accumulation):
                yield later, micro

    def __getitem__(self, place: tuple[int, int]) -> Packed | UserError:
        """One of this rank's micro-batches, or why there is none; made where it is asked for, in a worker."""
        made = self.samples[self.share(*place)]
        return made if isinstance(made, UserError) else packed(made)

    def share(self, step: int, micro: int) -> Wanted:
        """The numbers of one of this rank's micro-batches."""
        chosen = self.order.batch_at(step)
        part = slice_of(self.rank, self.world, micro, self.config.micro_batch_size)
        share = None
        if self.config.data.prior is not None and self.index.prior is not None:
            share = shares(chosen.part, self.index.prior, self.config.data.prior.weight)[part]
        return Wanted(chosen.bucket, chosen.part[part], chosen.member[part], chosen.visit[part], share)

    def steps_from(self, step: int) -> Generator[list[Batch], None, None]:
        """One list of `accumulation` micro-batches per optimizer step, from `step` on, without end.

        The workers begin at once, and end when the generator is closed or dropped.
        Raises UserError when too many records are unusable, and when the workers die or are too slow.
        """
        steps = self._steps_from(step)
        next(steps)
        return steps

    def _steps_from(self, step: int) -> Generator[list[Batch], None, None]:
        """An empty list once the workers are at work, then those of `steps_from`."""
        pinned = kind() != "cpu"
        batches = self.begin(step, pinned)

        def stop() -> None:
            end_workers(batches)

        # At exit multiprocessing asks workers to end, which ours ignore, and waits for them.
        atexit.register(stop)
        try:
            yield []
            while True:
                yield [self.next_batch(batches, step, micro, pinned) for micro in range(self.accumulation)]
                step += 1
        finally:
            atexit.unregister(stop)
            stop()

    def begin(self, step: int, pinned: bool) -> Any:
        """torch's iterator, its workers started and at work; UserError if one dies before all are."""
        others = set(active_children())
        try:
            return iter(self.torch_loader(step, pinned))
        except RuntimeError as error:
            found = str(error)
            if not found.startswith("DataLoader"):
                raise
        # With its error gone torch's half-made iterator is gone too, and has let go of its workers.
        for worker in set(active_children()) - others:
            worker.kill()
            worker.join(STUCK)
        raise self.late(step, 0, found)

    def torch_loader(self, step: int, pinned: bool) -> DataLoader[Any]:
        """torch's loader over this rank's micro-batches."""
        workers = self.config.data.workers
        several: dict[str, Any] = {}
        if workers:
            several = {
                "timeout": self.config.data.worker_timeout,
                # The whole next step is made while this one is trained on.
                "prefetch_factor": max(2, min(ceil(self.accumulation / workers), MOST_AHEAD // workers)),
                "worker_init_fn": partial(begin_worker, os.getpid()),
            }
        return DataLoader(
            cast(Any, self),
            batch_size=None,
            sampler=self.places(step),
            num_workers=workers,
            collate_fn=unchanged,
            pin_memory=pinned,
            generator=torch.Generator(),  # torch draws a seed from it, else from the run's global generator
            **several,
        )

    def next_batch(self, batches: Iterator[Packed | UserError], step: int, micro: int, pinned: bool) -> Batch:
        """The next micro-batch, or the error of the worker that was to make it."""
        try:
            made = next(batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            raise self.late(step, micro, str(error)) from error
        if isinstance(made, UserError):
            raise made
        self.note(made.words.faults)
        # A worker's memory holds an open file for as long as it lives; a list of many would use them up.
        return made.opened(copy=bool(self.config.data.workers) and not pinned)

    def note(self, faults: Iterable[Fault]) -> None:
        """Write down the records that turned out to be unusable; UserError if they are too many."""
        new = [fault for fault in faults if fault.name not in self.faults]
        if not new:
            return
        try:
            self.list.parent.mkdir(parents=True, exist_ok=True)
            # A kill in the middle of a line must not spoil the next one.
            torn = self.list.exists() and self.list.read_bytes()[-1:] not in (b"", b"\n")
            with self.list.open("a", encoding="utf-8") as file:
                file.write("\n" * torn)
                file.writelines(json.dumps(fault._asdict()) + "\n" for fault in new)
        except OSError as error:
            told = "; ".join(f"{fault.name}: {fault.reason}" for fault in new)
            print(f"{self.list} cannot be written: {error.strerror or error}; training goes on; {told}")
        self.faults.update(fault.name for fault in new)
        most = self.config.data.max_faults * len(self.index)
        if len(self.faults) > most:
            raise UserError(
                f"at most {self.config.data.max_faults:.2%} of {len(self.index):,} records unusable",
                f"{len(self.faults):,} could not be read; the last is {new[-1].name}: {new[-1].reason}",
                f"mend those listed in {self.list}, or allow more with data.max_faults",
            )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it a worker that dies while something else is done is a UserError, too."""
        try:
            yield
        except RuntimeError as error:  # which torch raises wherever the signal finds this process
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(f"the data on rank {self.rank}", str(error), UNREAD) from error

    def late(self, step: int, micro: int, found: str) -> UserError:
        """The error for a micro-batch that does not come."""
        mine = self.share(step, micro)
        ids = self.samples.cells.record(mine.bucket, mine.part, mine.member).tolist()
        return UserError(
            f"the data of step {step} on rank {self.rank}: {', '.join(map(self.index.name, ids))}",
            found,
            UNREAD,
        )


def read_faults(path: Path) -> list[str]:
    """The names in a list of faults, of an earlier start of the run; [] if there is none."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        with suppress(ValueError, KeyError, TypeError):  # half a line, of a start that was killed
            found.append(json.loads(line)["name"])
    return found


def unchanged(made: Any) -> Any:
    """In place of torch's collation, as a worker already makes whole micro-batches."""
    return made


def begin_worker(parent: int, _: int) -> None:
    """Settle a worker process: one thread for torch, no signal of the run's own, and no life after the run's.

    Slurm and the terminal send their signals to every process; a worker that died of one would take away
    the batches that the main process still needs to end in good order.
    """
    torch.set_num_threads(1)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    sys.excepthook = told_unless_alone
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def end_with(parent: int) -> None:
    """End this process within a second of that one.

    torch's own watch does not end a worker that still writes into a full pipe, which nobody reads.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def told_unless_alone(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """In a worker: show an error of a thread, unless it is that the run has hung up, as in Ctrl-C."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def end_workers(batches: Any) -> None:
    """End the workers of torch's iterator, at the latest 5 seconds each after it asked them to.

    By name, for the traceback of an error keeps the iterator alive; killing them before torch has let go of
    them would make its SIGCHLD handler raise here.
    """
    for worker in getattr(batches, "_workers", ()):
        worker.terminate = worker.kill  # torch's last resort; ours ignore SIGTERM
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
