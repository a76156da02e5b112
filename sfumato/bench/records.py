"""Any number of made-up records, and what a process does with them: one for each measurement.

    python -m sfumato.bench.records make 100000 STORE     makes the index and the buckets
    python -m sfumato.bench.records use 100000 STORE      opens them as a run does, and draws batches

Both print one line of JSON: seconds of each thing, and for `use` the process's memory in bytes.
"""

import gc
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import psutil
from PIL import Image

from sfumato.config import Buckets, Data, Layout
from sfumato.data import index
from sfumato.data.buckets import Cells
from sfumato.data.index import Index, open_index
from sfumato.data.order import Order
from sfumato.data.sources import Entry, Source, Span

BATCH = 32  # records of a step
DRAWN = 100  # batches before memory is read
EPOCH = 1000  # whose middle is sought
ASPECTS = [(600 + 40 * number, 1200 - 40 * number) for number in range(16)]  # (height, width)
MEMBER = 2**18  # bytes of a picture, in a tar file that is not there


class Synthetic(Source):
    """Records by number, layout.source of them; each is one of sixteen pictures of several aspects."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.count = int(layout.source)
        self.pictures = [jpeg(*size) for size in ASPECTS]

    def stamp(self) -> str:
        return f"{self.count}"

    def entries(self) -> Iterator[Entry]:
        for number in range(self.count):
            image = Span(f"{number // 10_000:05}.tar", number * MEMBER, MEMBER)
            yield Entry(f"{number:09}", image, (f"a photo of the thing with number {number}",), stamp="-")

    def open(self, span: Span) -> BinaryIO:
        return io.BytesIO(self.pictures[span.start // MEMBER % len(self.pictures)])


def jpeg(height: int, width: int) -> bytes:
    """A grey picture; of those only the header is read."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), "grey").save(file, "JPEG")
    return file.getvalue()


def opened(count: int, store: Path) -> Index:
    """The index of so many records, made first if it is not there."""
    vars(index)["open_source"] = Synthetic  # it is none of the layouts that a config can name
    return open_index(settings(count, store))


def settings(count: int, store: Path) -> Data:
    """The data table of so many records."""
    return Data(source=str(count), store=store, resolution=512, buckets=Buckets())


def cells_of(found: Index, count: int, store: Path) -> Cells:
    """The buckets of an index, made first if they are not there."""
    return Cells.build(found.folder, settings(count, store), found.sizes, found.part, len(found.parts))


def make(count: int, store: Path) -> dict[str, float]:
    """Make the index and the buckets of so many records; the seconds of each."""
    begin = time.perf_counter()
    found = opened(count, store)
    indexed = time.perf_counter()
    cells_of(found, count, store)
    assert len(found) == count, f"an index of {len(found)} records, not {count}"
    return {"index": indexed - begin, "buckets": time.perf_counter() - indexed}


def use(count: int, store: Path) -> dict[str, float]:
    """What a run does at its start, and at a resume; seconds of each, then bytes of memory."""
    times = [time.perf_counter()]
    found = opened(count, store)
    cells = cells_of(found, count, store)
    times.append(time.perf_counter())

    def ordered() -> Order:
        return Order(cells.counts, [part.repeats for part in found.parts], BATCH, 0)

    def names(order: Order, step: int) -> list[str]:
        chosen = order.batch_at(step)
        return [found.name(number) for number in cells.record(chosen.bucket, chosen.part, chosen.member)]

    order = ordered()
    names(order, 0)
    times.append(time.perf_counter())
    late = ordered()
    names(late, middle := (late.steps(EPOCH) + late.steps(EPOCH + 1)) // 2)
    times.append(time.perf_counter())
    for step in range(DRAWN):
        names(order, step)
    times.append(time.perf_counter())
    assert late.epoch_of(middle) == EPOCH, f"step {middle} is of epoch {late.epoch_of(middle)}"
    spans = [end - begin for begin, end in zip(times, times[1:], strict=False)]
    told = dict(zip(("open", "first", "seek", "batch"), spans, strict=True))
    told["batch"] /= DRAWN
    gc.collect()
    process = psutil.Process()
    # Pages of mapped files that nobody has written to are the system's cache: it takes them back at need.
    own = sum(mapped.anonymous for mapped in process.memory_maps(grouped=True))
    return told | {"own": own, "uss": process.memory_full_info().uss}


if __name__ == "__main__":
    verb, records, folder = sys.argv[1:]
    print(json.dumps({"make": make, "use": use}[verb](int(records), Path(folder))))
