"""Devices by name: what they hold and how fast they are said to be. Imports no torch."""

import difflib
from dataclasses import dataclass

from sfumato.errors import UserError


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    `low`, `usual`, `high`: the share of `half` at which published training runs made the arithmetic that they
    really executed, their exchange and optimizer left out; docs/planner.md names the runs.
    """

    name: str
    memory: int
    """GB as it is sold."""
    half: float
    """Peak of bf16 and fp16 with fp32 sums, dense, in TFLOP/s."""
    single: float | None
    """Peak of fp32 outside the matrix units, in TFLOP/s; None where no source says it."""
    bandwidth: float
    """Of its own memory, in GB/s."""
    link: float
    """What a collective of the devices of one machine gets, in GB/s each."""
    network: float
    """What a device gets of the network between machines, in GB/s."""
    host: float
    """To and from the memory of the machine, in GB/s."""
    low: float
    usual: float
    high: float
    source: str


SHEET = "maker's datasheet"
A100 = "published runs (MosaicML's SD2, NeMo's ControlNet, MindSpeed-MM's tables of SDXL); " + SHEET
HOPPER = "published runs (MLPerf v4.0 SDv2, NVIDIA's DFM); " + SHEET
ALONE = SHEET + "; no published run calibrates it, so the range is wide"
ATLAS = "MindSpeed-MM's tables of SDXL; link and network recalled, not confirmed"
DEVICES = (
    Device("A100-40", 40, 312, 19.5, 1555, 200, 25, 20, 0.24, 0.32, 0.35, A100),
    Device("A100-80", 80, 312, 19.5, 2039, 200, 25, 20, 0.24, 0.32, 0.35, A100),
    Device("H100", 80, 989, 67, 3350, 350, 50, 40, 0.18, 0.31, 0.34, HOPPER),
    Device("H200", 141, 989, 67, 4800, 350, 50, 40, 0.18, 0.31, 0.34, HOPPER),
    Device("RTX-4090", 24, 165, 82.6, 1008, 10, 3, 20, 0.18, 0.30, 0.50, ALONE),
    Device("RTX-3090", 24, 71, 35.6, 936, 10, 3, 20, 0.18, 0.30, 0.50, ALONE),
    Device("L40S", 48, 362, 91.6, 864, 20, 12, 20, 0.18, 0.30, 0.40, ALONE),
    Device("910B", 64, 313, None, 1600, 150, 25, 20, 0.25, 0.31, 0.35, ATLAS),
)
OTHER = {"a100": "A100-80", "4090": "RTX-4090", "3090": "RTX-3090", "ascend910b": "910B"}
"""Other words for them, as `plain` gives them."""


def plain(name: str) -> str:
    """A name without case, blanks and dashes."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def find(name: str) -> Device:
    """The device of a name, such as "H100", "rtx 4090" or "A100-40"; UserError with the nearest one."""
    known = {plain(device.name): device for device in DEVICES}
    word = plain(OTHER.get(plain(name), name))
    if word in known:
        return known[word]
    names = ", ".join(device.name for device in DEVICES)
    near = difflib.get_close_matches(word, [*known, *OTHER], 1, cutoff=0.5)
    right = known[plain(OTHER.get(near[0], near[0]))].name if near else ""
    raise UserError(
        f"--device {name}",
        f"no figures of a device of that name; known are {names}",
        f"did you mean {right}?" if right else "name one of these, or only --memory",
    )


LIKE = (("RTX-4090", 24), ("A100-40", 40), ("L40S", 48), ("910B", 64), ("A100-80", 80), ("H200", 141))
"""What stands for a device of which only the memory is known."""


def like(memory: float, called: str = "") -> Device:
    """The device that stands for one of so many bytes: the smallest that holds as much.

    called: what its maker calls it, which decides if it is known.
    """
    for word in ("h200", "h100", "4090", "3090", "l40s", "910b"):
        if word in plain(called):
            return find(word)
    if "a100" in plain(called):
        return find("A100-40" if memory < 60e9 else "A100-80")
    return find(next((name for name, gigabytes in LIKE if memory <= gigabytes * 1.08e9), "H200"))
