"""Worker processes: whatever goes wrong in one reaches the user in time, and none outlives its run."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sfumato.data.folder import Folder
from sfumato.data.loader import Loader
from sfumato.data.sources import files_under
from sfumato.errors import UserError
from tests.unit.batches import make
from tests.unit.pictures import config_of, data_of, text_folder


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_picture_is_the_users(tmp_path: Path, workers: int) -> None:
    text_folder(tmp_path, 6)
    whole = (tmp_path / "004.png").read_bytes()
    (tmp_path / "004.png").write_bytes(whole[: len(whole) // 2])
    stream = make(config_of(tmp_path, workers=workers)).steps_from(0)
    with pytest.raises(UserError, match=r"the image .*004\.png"):
        list(islice(stream, 3))
    assert not active_children()


class Odd(Folder):
    """A source in which one picture is trouble."""

    trouble: Callable[[], None]

    def image(self, index: int) -> Image.Image:
        if index == 4:
            self.trouble()
        return super().image(index)


def odd(place: Path, trouble: Callable[[], None], **settings: Any) -> Loader:
    source = Odd(place, files_under(place), data_of(place))
    source.trouble = trouble
    return Loader(config_of(place, **settings), source, 4, 8)


def test_hanging_worker_ends_in_an_error(tmp_path: Path) -> None:
    loader = odd(text_folder(tmp_path, 6), lambda: time.sleep(3600), workers=2, worker_timeout=1.0)
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        list(islice(loader.steps_from(0), 3))
    assert time.monotonic() - begin < 30
    for word in ("the data of step 0", "004.png", "timed out after 1", "data.worker_timeout"):
        assert word in str(caught.value)
    assert not active_children(), "the stuck worker is still there"


def test_killed_worker_ends_in_an_error(tmp_path: Path) -> None:
    """What the kernel does when memory runs out."""
    loader = odd(text_folder(tmp_path, 6), lambda: os.kill(os.getpid(), signal.SIGKILL), workers=2)
    with pytest.raises(UserError, match=r"(?s)the data of step 0.*DataLoader worker"):
        list(islice(loader.steps_from(0), 3))
    assert not active_children()


def test_defect_in_a_worker_keeps_its_traceback(tmp_path: Path) -> None:
    def defect() -> None:
        raise KeyError("ours")

    loader = odd(text_folder(tmp_path, 6), defect, workers=1)
    with pytest.raises(KeyError, match="test_data_workers.py"):
        list(islice(loader.steps_from(0), 3))


def test_workers_outlive_the_signals_of_a_run(tmp_path: Path) -> None:
    """Slurm and Ctrl-C signal every process of the run; the main process still gets its batches."""
    caught: list[int] = []
    before = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in (2, 10, 12, 15)}
    stream = make(config_of(text_folder(tmp_path, 6), workers=2)).steps_from(0)
    try:
        next(stream)
        workers = active_children()
        assert len(workers) == 2
        for worker in workers:
            for number in (2, 10, 12, 15):
                os.kill(worker.pid or 0, number)
        assert len(list(islice(stream, 6))) == 6
        assert all(worker.is_alive() for worker in workers)
    finally:
        stream.close()  # type: ignore[attr-defined]
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not caught and not active_children()


@pytest.mark.parametrize("how", ["falls off the end", "raises", "is ended by SIGTERM", "is killed"])
def test_nothing_outlives_the_run(tmp_path: Path, how: str) -> None:
    """A process whose loader is still open ends in seconds, and its workers with it."""
    text_folder(tmp_path, 6)
    ending = {"raises": "raise SystemExit(3)"}.get(how, "")
    if how.startswith("is "):
        ending = "import time; time.sleep(60)"
    script = f"""
        from multiprocessing import active_children
        from tests.unit.pictures import config_of
        from tests.unit.batches import make

        stream = make(config_of({str(tmp_path)!r}, workers=2)).steps_from(0)
        next(stream)
        print(*[child.pid for child in active_children()], flush=True)
        {ending}
    """
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2
        if how == "is ended by SIGTERM":
            process.terminate()
        elif how == "is killed":
            process.kill()
        assert process.wait(20) == {"raises": 3, "is killed": -9, "is ended by SIGTERM": -15}.get(how, 0)
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "a worker is still there"
        time.sleep(0.2)


def test_many_micro_batches_do_not_use_up_files(tmp_path: Path) -> None:
    """A worker's tensor holds an open file: two lists of 64 micro-batches would need more than 1024."""
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    stream = make(config_of(text_folder(tmp_path, 6), batch_size=64, micro=1, workers=2)).steps_from(0)
    held = [next(stream), next(stream)]
    assert len(held[0]) == 64
    assert len(list(descriptors.iterdir())) - before < 700  # those that came before their turn
    stream.close()  # type: ignore[attr-defined]
