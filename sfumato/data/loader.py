"""Batches for the training loop, made ahead of time by worker processes.

What a batch holds depends on (source, config, step) alone: not on the number of workers or ranks, nor on
where a run was resumed.
"""

import atexit
import signal
from collections.abc import Generator, Iterator
from math import ceil
from multiprocessing import active_children
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sfumato.config import Config
from sfumato.data import draws
from sfumato.data.batch import Batch, Draws
from sfumato.data.order import batch_at, slice_of
from sfumato.data.sources import Source
from sfumato.data.transforms import prepare, upright_rgb
from sfumato.errors import UserError

Wanted = tuple[np.ndarray, np.ndarray]  # ids (B,) and visits (B,), both int64
STUCK = 5.0  # seconds for a killed worker to be gone
MOST_AHEAD = 64  # micro-batches made ahead; each waits as ten open files, of which 1024 are usual


class Samples(Dataset["Batch | UserError"]):
    """Turns the ids and visits of one micro-batch into its Batch. Holds no state."""

    def __init__(self, config: Config, source: Source, latent_channels: int, vae_factor: int) -> None:
        side = config.data.resolution
        assert side % vae_factor == 0, f"resolution {side} is not divisible by the VAE's {vae_factor}"
        self.data, self.source, self.seed = config.data, source, config.seed
        self.perturbed = config.objective.input_perturbation > 0
        self.target = side, side
        self.latent = latent_channels, side // vae_factor, side // vae_factor

    def __getitem__(self, wanted: Wanted) -> Batch | UserError:
        try:
            return self.batch(*wanted)
        except UserError as error:
            # torch would wrap a worker's exception into a RuntimeError; a returned one stays itself.
            return error

    def batch(self, ids: np.ndarray, visits: np.ndarray) -> Batch:
        """Read, transform and draw; ids and visits are (B,). Raises UserError for an unreadable image."""
        names = list(zip(ids.tolist(), visits.tolist(), strict=True))
        samples = [self.sample(*name) for name in names]
        return Batch(
            ids=torch.from_numpy(ids.copy()),  # (B,)
            visits=torch.from_numpy(visits.copy()),  # (B,)
            pixels=torch.stack([sample[0] for sample in samples]),  # (B, 3, H, W)
            captions=[sample[2] for sample in samples],
            dropped=torch.tensor(
                [draws.uniform(self.seed, *name, draws.DROPOUT) < self.data.caption_dropout for name in names]
            ),  # (B,)
            size_and_crop=torch.tensor([sample[1] for sample in samples], dtype=torch.float32),  # (B, 6)
            draws=self.drawn(names),
        )

    def sample(self, number: int, visit: int) -> tuple[Tensor, tuple[int, ...], str]:
        """One visit of one sample: pixels (3, H, W), size and crop, caption."""
        record = self.source[number]
        crop_draw = draws.generator(self.seed, number, visit, draws.CROP).random(2)
        crop = None if self.data.center_crop else (float(crop_draw[0]), float(crop_draw[1]))
        flip = self.data.flip and draws.uniform(self.seed, number, visit, draws.FLIP) < 0.5
        pixels, six = prepare(upright_rgb(record.image, record.name), self.target, crop, flip)
        choice = draws.pick(draws.uniform(self.seed, number, visit, draws.CAPTION), len(record.captions))
        return pixels, six, record.captions[choice]

    def drawn(self, names: list[tuple[int, int]]) -> Draws:
        """The random numbers of B visits, each from its own streams."""

        def normal(stream: int, shape: tuple[int, ...]) -> Tensor:
            return torch.from_numpy(
                np.stack([draws.normal(self.seed, *name, stream, shape) for name in names])
            )

        times = [draws.generator(self.seed, *name, draws.TIMESTEP).random(dtype=np.float32) for name in names]
        return Draws(
            posterior=normal(draws.POSTERIOR, self.latent),  # (B, c, h, w)
            noise=normal(draws.NOISE, self.latent),  # (B, c, h, w)
            timestep=torch.from_numpy(np.array(times, np.float32)),  # (B,)
            offset=normal(draws.OFFSET, (self.latent[0], 1, 1)),  # (B, c, 1, 1)
            perturbation=normal(draws.PERTURBATION, self.latent) if self.perturbed else None,  # (B, c, h, w)
        )


class Loader:
    """The micro-batches of one rank, from any step on."""

    def __init__(
        self,
        config: Config,
        source: Source,
        latent_channels: int,
        vae_factor: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Raises UserError where the batch cannot be cut into equal micro-batches for all ranks."""
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.config, self.source, self.rank, self.world = config, source, rank, world
        self.accumulation = config.accumulation(world)
        self.samples = Samples(config, source, latent_channels, vae_factor)

    def wanted(self, step: int) -> Iterator[Wanted]:
        """The ids and visits of every micro-batch of this rank, from a step on, without end."""
        while True:
            ids, visits = batch_at(len(self.source), self.config.batch_size, self.config.seed, step)
            for micro in range(self.accumulation):
                part = slice_of(self.rank, self.world, micro, self.config.micro_batch_size)
                yield ids[part], visits[part]
            step += 1

    def steps_from(self, step: int) -> Generator[list[Batch], None, None]:
        """One list of `accumulation` micro-batches per optimizer step, from `step` on, without end.

        The workers begin with the first list and end when the generator is closed or dropped.
        Raises UserError for an unreadable image, and when the workers die or are too slow.
        """
        pinned = torch.accelerator.is_available()
        batches = self.begin(step, pinned)

        def stop() -> None:
            end_workers(batches)

        # At exit multiprocessing asks workers to end, which ours ignore, and waits for them.
        atexit.register(stop)
        try:
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
                "worker_init_fn": begin_worker,
            }
        return DataLoader(
            self.samples,
            batch_size=None,
            sampler=self.wanted(step),
            num_workers=workers,
            collate_fn=unchanged,
            pin_memory=pinned,
            generator=torch.Generator(),  # torch draws a seed from it, else from the run's global generator
            **several,
        )

    def next_batch(self, batches: Iterator[Batch | UserError], step: int, micro: int, pinned: bool) -> Batch:
        """The next micro-batch, or the error of the worker that was to make it."""
        try:
            batch = next(batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            raise self.late(step, micro, str(error)) from error
        if isinstance(batch, UserError):
            raise batch
        # A worker's tensor holds a file descriptor for as long as it lives; a list of many would use them up.
        return batch.map(Tensor.clone) if self.config.data.workers and not pinned else batch

    def late(self, step: int, micro: int, found: str) -> UserError:
        """The error for a micro-batch that does not come."""
        ids, _ = batch_at(len(self.source), self.config.batch_size, self.config.seed, step)
        mine = ids[slice_of(self.rank, self.world, micro, self.config.micro_batch_size)]
        return UserError(
            f"the data of step {step} on rank {self.rank}: {', '.join(map(self.source.name, mine.tolist()))}",
            found,
            "see whether these files can be read in time and whether memory is short; data.worker_timeout is "
            "the time allowed in seconds, data.workers = 0 loads in the training process",
        )


def unchanged(batch: Any) -> Any:
    """In place of torch's collation: a worker already makes whole micro-batches."""
    return batch


def begin_worker(_: int) -> None:
    """Settle a worker process: one thread, and no signal of the run's own.

    Slurm and the terminal send their signals to every process; a worker that died of one would take away
    the batches that the main process still needs to end in good order.
    """
    torch.set_num_threads(1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def end_workers(batches: Any) -> None:
    """End the workers of torch's iterator, at the latest 5 seconds each after it asked them to.

    By name, for the traceback of an error keeps the iterator alive; killing them before torch has let go of
    them would make its SIGCHLD handler raise here.
    """
    for worker in getattr(batches, "_workers", ()):
        worker.terminate = worker.kill  # torch's last resort; ours ignore SIGTERM
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
