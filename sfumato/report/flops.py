"""The arithmetic of a run's samples, found beside the training, and the peak of its device.

    python -m sfumato.report.flops < {"config": …, "sizes": [[512, 512], …]}

prints {"size", "flops"} for each size as it is known. That takes seconds a size (planner.trace), so a process
of its own does it, and no step waits for it.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from sfumato.config import Config, parse
from sfumato.planner import devices
from sfumato.planner.architectures import facts_of
from sfumato.planner.speed import peak

KNOWN = ("h200", "h100", "a100", "4090", "3090", "l40s", "910b")
"""Parts of a maker's name that name the chip whose datasheet we have ..."""
OTHERS = ("h100pcie", "h100nvl", "4090d", "laptop", "mig")
"""... but not those with these, which are slower."""

Size = tuple[int, int]


class Flops:
    """FLOPs of one sample's forward and backward pass at each size, (height, width), once they are known."""

    def __init__(self, config: Config, sizes: Sequence[Size]) -> None:
        """Begin to find them, in the order of sizes."""
        self.found: dict[Size, int] = {}
        # It is no rank, and computes nothing on a device.
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sfumato.report.flops"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=ours | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            text=True,
        )
        asked = json.dumps({"config": config.model_dump(mode="json"), "sizes": [*sizes]})
        self.thread = threading.Thread(target=self._read, args=(asked,), name="flops", daemon=True)
        self.thread.start()

    def of(self, sizes: Mapping[Size, int]) -> int | None:
        """FLOPs of so many samples of each size; None while one of them is not known."""
        if any(size not in self.found for size in sizes):
            return None
        return sum(self.found[size] * count for size, count in sizes.items())

    def close(self) -> None:
        """Leave the rest."""
        self.process.kill()
        self.process.wait()
        self.thread.join()

    def _read(self, asked: str) -> None:
        process = self.process
        assert process.stdin is not None and process.stdout is not None, "it was started without pipes"
        with suppress(OSError, ValueError):  # it was ended
            process.stdin.write(asked)
            process.stdin.close()
            for line in process.stdout:
                told = json.loads(line)
                self.found[told["size"][0], told["size"][1]] = told["flops"]
        process.stdout.close()


def peak_of(called: str, precision: str) -> float | None:
    """FLOP/s that a device is sold with, by what its maker calls it; None where no source is known."""
    word = devices.plain(called)
    if any(other in word for other in OTHERS) or not any(name in word for name in KNOWN):
        return None
    return peak(devices.like(0, called), precision)


def main() -> None:
    """Answer what was asked on the standard input."""
    from sfumato.planner.trace import trace  # takes seconds, and the rest of this file needs none of it

    with suppress(OSError):
        os.nice(10)
    asked: Any = json.loads(sys.stdin.read())
    config = parse(asked["config"])
    facts = facts_of(config.model)
    for height, width in asked["sizes"]:
        cost = trace(config, facts, (height, width))
        print(json.dumps({"size": [height, width], "flops": cost.model_flops}), flush=True)


if __name__ == "__main__":
    main()
