"""TensorBoard: event files in the run's folder, in `tensorboard`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from sfumato.config import Config
from sfumato.report.trackers import settings


class TensorBoard:
    """Event files; those of steps that were undone are hidden by `purge_step`."""

    def __init__(self, folder: Path, step: int) -> None:
        """step: the applied steps that stand."""
        self.id = self.folder = str(folder)
        self.writer = SummaryWriter(self.folder, purge_step=step + 1 if step else None)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of one line."""
        for name, value in scalars.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def images(self, step: int, files: Sequence[Path]) -> None:
        """The previews of a step."""
        for file in files:
            with Image.open(file) as image:
                self.writer.add_image(file.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def back_to(self, step: int) -> None:
        """Hide what was told of later steps."""
        self.writer.close()
        self.writer = SummaryWriter(self.folder, purge_step=step + 1)

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


def begin(config: Config, kept: str | None, step: int) -> TensorBoard:
    """Event files beside those of earlier starts; the settings are a text of the first step."""
    tracker = TensorBoard(config.folder / "tensorboard", step)
    if kept is None:
        rows = "\n".join(f"    {name} = {value!r}" for name, value in settings(config).items())
        tracker.writer.add_text("settings", rows, 0)
    return tracker
