"""How long a step takes on a named device, by a model with stated factors. Imports no torch.

Nothing here was timed: peaks are datasheets', and the share of them that arithmetic reaches is that of
published runs (`devices.py`). So every figure has a range.
"""

from dataclasses import dataclass

from sfumato.config import Config
from sfumato.engine.profiles import kinds
from sfumato.planner.devices import Device
from sfumato.planner.traffic import Traffic

LAUNCH = 10e-6
"""Seconds for a kernel that the host has to start; assumed; 5 to 12 us are usual."""
MOVED = {"adamw": 34, "sgd": 18}
"""Bytes that an optimizer moves in memory for each weight that it steps, norm and clipping included:
reads and writes of master, moments, gradient and low-precision weight."""
HOST_MEMORY = 100e9
"""Bytes a second of a machine's memory, for all its ranks together, while its cores step weights; assumed."""


@dataclass(frozen=True)
class Work:
    """What one sample takes: arithmetic of what learns, of what encodes, and kernels of a micro-batch."""

    flops: float
    encode_flops: float
    kernels: int


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step, and images a second over all ranks."""

    compute: float
    encode: float
    exchange: float
    host: float
    optimizer: float
    samples: int

    @property
    def step(self) -> float:
        """Seconds of all of it, one after another; at most, for gradients travel beneath a backward pass."""
        return self.compute + self.encode + self.exchange + self.host + self.optimizer

    @property
    def images(self) -> float:
        """Images a second."""
        return self.samples / self.step


def peak(device: Device, precision: str) -> float | None:
    """FLOP/s of a precision; None where no source says it.

    fp32's is that of products outside the matrix units; torch lets convolutions use those, and be faster.
    """
    found = device.single if precision == "fp32" else device.half
    return None if found is None else found * 1e12


def speed(
    config: Config,
    world: int,
    local: int,
    device: Device,
    work: Work,
    sent: Traffic,
    own: int,
    share: float,
    on_host: bool,
) -> Speed | None:
    """How long a step of `world` ranks, `local` on each machine, takes; None where no peak is known.

    own: how many weights a rank's optimizer steps. share: of the peak that arithmetic reaches. on_host:
    whether the machine's cores step them.
    """
    rate = peak(device, config.engine.precision)
    half = peak(device, "bf16")
    if rate is None or half is None:
        return None
    times, micro = config.accumulation(world), config.micro_batch_size
    compute = times * max(micro * work.flops / (rate * share), work.kernels * LAUNCH)
    # Nearly all of it are convolutions, which the matrix units take in TF32 at half the speed.
    vae = config.model.vae_dtype if config.model.vae_dtype != "auto" else config.engine.precision
    slower = 1 if vae == "bf16" else 2
    encode = times * micro * work.encode_flops * slower / (half * share)
    link = max(sent.link / (device.link * 1e9), sent.network / (device.network * 1e9))
    memory = HOST_MEMORY / local if on_host else device.bandwidth * 1e9
    numbers = own * (MOVED[config.optimizer.name] + 12 * len(kinds(config.ema)))
    return Speed(compute, encode, link, sent.host / (device.host * 1e9), numbers / memory, config.batch_size)
