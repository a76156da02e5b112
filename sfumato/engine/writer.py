"""Checkpoints are written behind the training: copied to memory, then to disk by a thread of each rank.

All ranks write into a hidden folder, agree on how that went, and the first one publishes it by one rename.
A write that fails leaves every published checkpoint as it is; the run goes on, and the next save tries again.
"""

import errno
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sfumato.engine import profiles, published, saved
from sfumato.engine.content import layout, manifest_of, slices
from sfumato.engine.engine import Engine
from sfumato.engine.size import readable
from sfumato.errors import UserError

Told = TypeVar("Told")
GRACE = 5.0
"""Seconds in which the thread may still say what it has waited for in vain."""


class Failed(Exception):
    """A write that did not succeed, as all ranks know."""


@dataclass(frozen=True)
class Job:
    """A copy of the run at one step, to be written to one folder or several."""

    step: int
    folders: tuple[tuple[Path, dict[str, Tensor]], ...]
    """Where to, and this rank's part of it."""
    manifest: dict[str, Any]
    still: float
    """Seconds that the training stood still for it."""
    lacking: Exception | None = None
    """Why this rank has no copy: there was no memory for one."""


class Writer:
    """Saves a run without stopping it for longer than a copy to memory takes; all ranks call it together.

        with Writer(engine, facts, tell, beside) as writer:
            writer.save()               # after step 500, say; again after step 1000
            writer.save("averages")     # the averages alone, to averages/step-001000
            writer.join()               # raises UserError if the last write failed; so does leaving the block

    The thread uses a gloo group of its own, CPU memory of its own and no random numbers.
    """

    def __init__(
        self,
        engine: Engine,
        facts: Mapping[str, Any],
        tell: Callable[[str], None],
        beside: Callable[[Path], None] | None = None,
        folder: Path | None = None,
        keep: int | None = None,
    ) -> None:
        """Made on all ranks together.

        facts: JSON values for each manifest, read at each save. tell: hears on the first rank of what was
        written and what could not be. beside: called on the first rank with the folder of a whole checkpoint
        before that is published; it may add what can be made from it. folder, keep: other than the config's.
        """
        config = engine.config
        self.engine, self.facts, self.tell, self.beside = engine, facts, tell, beside
        self.folder = folder or config.folder / "checkpoints"
        self.averages = self.folder.with_name("averages")
        self.keep = keep or config.checkpoint.keep
        self.limit = config.engine.timeout
        self.step: int | None = None
        """The step of the newest checkpoint that was asked for."""
        self.at: int | None = None
        """The position of that one."""
        self.doing = "nothing"
        self._memory = saved.Memory(engine.ranks.device, engine.swap.path if engine.swap else None)
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._broken: Exception | None = None
        self._group = None
        if engine.ranks.world > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.limit))

    def is_saved(self) -> bool:
        """Whether the engine's step and position are those of the newest checkpoint that was asked for."""
        return (self.step, self.at) == (self.engine.step_count, self.engine.position)

    def save(self, *what: str) -> None:
        """Copy the engine's state and have it written while the training goes on.

        what: "checkpoint" (also if nothing is named), "averages", or both. Waits for the write before this
        one, whose failure was told, and does not end the run.
        """
        assert set(what) <= {"checkpoint", "averages"}, f"nothing is called {what}"
        began = time.monotonic()
        self._wait(self.limit + GRACE)
        copies: dict[str, Tensor] = {}
        folders, lacking = [], None
        try:
            whole = what != ("averages",)
            wanted = {key: (n, torch.float32) for key, n in layout(self.engine) if whole or is_average(key)}
            copies = self._memory.fill(wanted, ((k, x) for k, x in slices(self.engine) if k in wanted))
        except (RuntimeError, MemoryError, OSError) as error:
            lacking = error  # the others hear of it from the thread
        if not what or "checkpoint" in what:
            folders.append((self.folder, copies))
            self.step, self.at = self.engine.step_count, self.engine.position
        if "averages" in what:
            kept = {key: part for key, part in copies.items() if is_average(key)}
            folders.append((self.averages, kept))
        manifest = manifest_of(self.engine, self.facts)
        still = time.monotonic() - began
        job = Job(self.engine.step_count, tuple(folders), manifest, still, lacking)
        self._failure = None
        self._thread = threading.Thread(
            target=self._run, args=(job,), name=f"writer of step {job.step}", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Wait until all that was asked for is on disk. UserError on all ranks if the last write failed."""
        self._wait(self.limit + GRACE)
        if self._failure is not None:
            newest = published.steps_in(self.folder)
            kept = f"; it goes on from step {newest[-1]}" if newest else ""
            raise UserError(
                f"to save the run in {self.folder.parent}",
                self._failure,
                f"mend that and start the same command again{kept}",
            )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.join()
            elif self._thread is not None:
                # If others have died, the exchange with them ends this at once.
                self._thread.join(self.limit)
        finally:
            if self._group is not None and not self._writing():
                dist.destroy_process_group(self._group)
                self._group = None

    def _writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wait(self, limit: float) -> None:
        """Let the write in progress end. UserError if it does not, or the ranks lost each other."""
        if self._thread is not None:
            self._thread.join(limit)
            if self._thread.is_alive():
                raise UserError(
                    f"to save the run in {self.folder.parent}",
                    f"the {self._thread.name} has waited more than {limit:.0f} s for {self.doing}",
                    "see whether the disk and the other ranks are alive; the checkpoints before it are whole",
                )
            self._thread = None
        if self._broken is not None:
            raise UserError(
                f"to save the run in {self.folder.parent}",
                f"the ranks lost each other while waiting for {self.doing}: {self._broken}",
                "see what became of the others; the checkpoints before it are whole",
            ) from self._broken

    # What follows runs in the thread.

    def _run(self, job: Job) -> None:
        try:
            for folder, tensors in job.folders:
                try:
                    self._write(job, folder, tensors)
                except Failed as error:
                    self._failure = str(error)
                    if self.engine.ranks.first:
                        self.tell(f"{error}. Those before it are whole; training goes on, and saves again")
        except Exception as error:
            self._broken = error

    def _write(self, job: Job, folder: Path, tensors: dict[str, Tensor]) -> None:
        """One folder, on all ranks together. Raises Failed, on all of them, if one could not do its part."""
        began, ranks = time.monotonic(), self.engine.ranks
        final = published.path_of(folder, job.step)
        part = final.with_name(f".{final.name}.part")
        name = f"rank-{ranks.rank:05d}.safetensors"
        needed = 0

        def count() -> int:
            if job.lacking is not None:
                raise job.lacking
            return sum(tensor.nbytes for tensor in tensors.values())

        try:
            needed = sum(self._all("the others", count))
            self._all(
                "the first rank's folder", lambda: published.begin(part, needed) if ranks.first else None
            )
            self._all("the sight of it", lambda: published.see(part))
            entries = self._all("the ranks' files", lambda: (name, saved.write(part / name, tensors)))
            manifest = job.manifest | {"files": dict(entries), "export": {}}
            self._all("the first rank", lambda: self._publish(part, final, manifest) if ranks.first else None)
        except Failed as error:
            if ranks.first:
                shutil.rmtree(part, ignore_errors=True)
            free = published.room_at(folder)
            room = (
                f" ({readable(needed)} are needed, {readable(free)} are free)"
                if needed and free is not None
                else ""
            )
            raise Failed(f"{final.parent.name}/{final.name} could not be written: {error}{room}") from None
        if ranks.first:
            self._prune(folder)
            seconds = time.monotonic() - began
            self.tell(
                f"{folder.name}/{final.name} is written: {readable(needed)} in {seconds:.1f} s; "
                f"training stood still for {job.still:.2f} s"
            )

    def _publish(self, part: Path, final: Path, manifest: dict[str, Any]) -> None:
        """On the first rank: manifest, export, and the name."""
        for name, told in manifest["files"].items():
            if (part / name).stat().st_size != told["size"]:
                raise OSError(errno.EIO, f"the first rank sees another size of {name} than was written")
        published.write_manifest(part, manifest)
        if self.beside is not None and final.parent == self.folder:
            self.doing = "the export of the first rank"
            self.beside(part)
            if (part / "export").is_dir():
                export = published.listed(part / "export")
                published.write_manifest(part, manifest | {"export": export})
        published.sync(part)
        published.publish(part, final)

    def _prune(self, folder: Path) -> None:
        """On the first rank: drop what is older than the newest few, except every so many steps."""
        if folder != self.folder:
            return
        every = self.engine.config.checkpoint.keep_every
        for step in published.steps_in(folder)[: -self.keep]:
            if every is None or step % every:
                try:
                    published.remove(published.path_of(folder, step))
                except OSError as error:
                    self.tell(f"the checkpoint of step {step} could not be removed: {error}")

    def _all(self, what: str, act: Callable[[], Told]) -> list[Told]:
        """Act on this rank and hear of all others; raises Failed on all ranks if one of them could not."""
        ranks = self.engine.ranks
        self.doing = f"its own part of {what}"
        mine: tuple[Told | None, str | None] = None, None
        try:
            mine = act(), None
        except Exception as error:
            mine = None, reason(error)
        every = [mine]
        if self._group is not None:
            self.doing = what
            dist.monitored_barrier(self._group, timedelta(seconds=self.limit), wait_all_ranks=True)
            every = [mine] * ranks.world
            dist.all_gather_object(every, mine, group=self._group)
        wrong = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(every) if text is not None]
        if wrong:
            raise Failed("; ".join(wrong))
        return [value for value, _ in every]  # type: ignore[misc]


def is_average(key: str) -> bool:
    """Whether kind/parameter/start is of an average."""
    return profiles.is_average(key.split("/")[0])


def reason(error: Exception) -> str:
    """An error in few words."""
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    return ": ".join(str(part) for part in (error.strerror or error, error.filename) if part)
