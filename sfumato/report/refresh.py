"""The report page, written again and again beside the training."""

import threading
import time
from collections.abc import Callable
from pathlib import Path


class Refresh:
    """Writes report.html in a thread of its own, one at a time; no step waits for it."""

    def __init__(self, folder: Path, every: float, tell: Callable[[str], None]) -> None:
        """every: seconds between two writings. tell: hears, once, why the page cannot be written."""
        self.folder, self.every, self.tell = folder, every, tell
        self.began = time.monotonic()
        self.thread: threading.Thread | None = None
        self.fault, self.told = "", False

    def soon(self) -> None:
        """Write it if that is due, and none is being written; one that failed is tried again when it is."""
        if self.fault and not self.told:
            self.told = True
            self.tell(self.fault)
        if time.monotonic() - self.began < self.every or (self.thread and self.thread.is_alive()):
            return
        self.began = time.monotonic()
        self.thread = threading.Thread(target=self._write, name="report", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Wait for the one that is being written, at most a minute."""
        if self.thread is not None:
            self.thread.join(60)

    def _write(self) -> None:
        self.fault = write(self.folder)


def write(folder: Path) -> str:
    """Write a run's report.html; why not, in words, where that failed: it ends no run."""
    from sfumato.report.page import write as write_page

    told = list[str]()
    try:
        write_page(folder, told.append)
    except Exception as error:
        told.append(f"the report of {folder} could not be written: {type(error).__name__}: {error}")
    return "\n".join(told)
