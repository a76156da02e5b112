"""What a run would encode at every visit, encoded once before it: the VAE's moments, the captions, or both.

    cached = fill(config, plan.index, plan.cells, family, place)

Only what the store lacks is encoded, shared among the ranks; a start that is killed has lost at most the
shard that each rank was filling. What a run needs is noted in the store, so that `prune` can free the rest.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato import prior, run, start
from sfumato.config import Config
from sfumato.data.batch import Fault
from sfumato.data.buckets import Cells
from sfumato.data.cached import Cached
from sfumato.data.captions import possible
from sfumato.data.index import Index
from sfumato.data.samples import Samples
from sfumato.data.store import Store, key_of
from sfumato.data.store.writer import Writer
from sfumato.data.transforms import Geometry
from sfumato.engine.ranks import Ranks
from sfumato.errors import UserError
from sfumato.models.family import Family
from sfumato.report.counter import Counter

CHUNK = 4096  # records that are looked up at once
CAPTIONS = 64  # captions in a forward pass
Image = tuple[int, Geometry, bytes]  # record, cut, key
Work = tuple[list[Image], Iterator[Tensor | Fault]]  # a micro-batch, and what is read of it


def fill(config: Config, index: Index, cells: Cells, family: Family, place: Ranks) -> Cached:
    """Encode what the store lacks, all ranks together; the view of the store that the loader reads.

    Images that cannot be read or encoded are written to the run's folder, faults/cache-rank-N.jsonl. Raises
    UserError on all ranks where they are more than data.max_faults allows.
    """
    filler = Filler(config, index, cells, family, place)
    # On a network file system ranks may see other shards for a while: they decide together.
    if place.any(not filler.complete()):
        if filler.cached.captions is not None:
            filler.captions()
        if filler.cached.images is not None:
            filler.images()
        place.barrier()
        if place.first:
            filler.cached.store.refresh()  # which makes the table that the others then find
            filler.note()
        place.barrier()
        filler.cached.store.refresh()
    family.release()
    return filler.cached


def kept(family: Family, posterior: str) -> str:
    """What the VAE is, and how much of its answer is kept: of a mean alone no sample can be drawn."""
    encoder = family.identity(images=True)
    return f"{encoder} {posterior}"


class Filler:
    """Encodes for one run, on one of its ranks."""

    def __init__(self, config: Config, index: Index, cells: Cells, family: Family, place: Ranks) -> None:
        self.config, self.index, self.cells, self.family, self.place = config, index, cells, family, place
        asked, store = config.data.cache, Store(config.data.store)
        self.cached = Cached(
            store,
            images=kept(family, config.data.posterior) if asked in ("images", "both") else None,
            captions=family.identity(images=False) if asked in ("captions", "both") else None,
        )
        self.again: list[str] = []  # images that were encoded in fp32, because less was not enough
        # What is read for encoding is read as for training, live.
        self.samples = Samples(config, index, cells, family.latent_channels, family.vae_factor, None)
        data = config.data.model_dump(
            mode="json", exclude={"workers", "worker_timeout", "store", "max_faults"}
        )
        told = json.dumps([data, config.seed, index.folder.name], sort_keys=True)
        self.use = key_of(str(config.folder.absolute())).hex()
        self.wish = key_of(told, self.cached.images, self.cached.captions).hex()

    def complete(self) -> bool:
        """Whether an earlier start of this run left nothing to do."""
        for use in self.cached.store.uses():
            if use.name == self.use and use.facts.get("wish") == self.wish:
                return bool(self.cached.store.has(use.keys()).all())
        return False

    # Captions.

    def captions(self) -> None:
        """Encode every text that a visit can have, and the unconditional one."""
        with (
            self.cached.store.writer(f"captions-{self.place.rank}") as writer,
            Counter("captions", self.place.first) as done,
        ):
            if (
                self.mine(null := self.cached.caption_key(None))
                and not self.cached.store.has(array([null])).all()
            ):
                rows = self.family.null_condition()
                writer.add(null, {name: row[0].cpu().contiguous() for name, row in rows.items()})
            seen: set[bytes] = set()
            for chunk in batches(range(len(self.index)), CHUNK):
                texts = {self.cached.caption_key(text): text for n in chunk for text in self.texts(n)}
                wanted = [key for key in texts if self.mine(key) and key not in seen]
                missing = self.missing(wanted)
                seen.update(missing)  # until their shard is published the store does not know them
                for keys in batches(missing, CAPTIONS):
                    encoded = self.family.encode_prompts([texts[key] for key in keys])
                    for row, key in enumerate(keys):
                        writer.add(
                            key, {name: rows[row].cpu().contiguous() for name, rows in encoded.items()}
                        )
                done.add(len(chunk), len(self.index))

    def texts(self, number: int) -> set[str]:
        """Every text that a record's visits can have."""
        record = self.index.record(number)
        wording = self.samples.wording[record.part]
        return possible(wording, record.captions, record.weights, self.config.seed, number)

    def mine(self, key: bytes) -> bool:
        """Whether this rank encodes a caption; equal ones have equal keys and thus one rank."""
        return key[0] % self.place.world == self.place.rank

    # Images.

    def images(self) -> None:
        """Encode every cut of every image that a visit can show."""
        faults: list[Fault] = []
        total = int(self.cells.counts.sum())
        with (
            ThreadPoolExecutor(max(1, self.config.data.workers)) as readers,
            self.cached.store.writer(f"images-{self.place.rank}") as writer,
            Counter("images", self.place.first) as done,
        ):
            for bucket in range(len(self.cells.sizes)):
                for chunk in batches(self.members(bucket, self.place.rank, self.place.world), CHUNK):
                    cuts = [image for n in chunk for image in self.cuts(n, self.cells.sizes[bucket])]
                    missing = set(self.missing([key for *_, key in cuts]))
                    wanted = list({key: (n, cut, key) for n, cut, key in cuts if key in missing}.values())
                    for images, pictures in self.ahead(wanted, readers):
                        self.encode(images, pictures, writer, faults)
                    done.add(len(chunk) * self.place.world, total)
        if self.again:
            kind = str(self.family.vae_dtype).removeprefix("torch.")
            told = f"{len(self.again)} images overflow the VAE in {kind} and were encoded in fp32:"
            print(told, *self.again[:9])
        write_faults(self.config.folder / "faults" / f"cache-rank-{self.place.rank}.jsonl", faults)
        self.judge({fault.name for fault in faults})

    def judge(self, bad: set[str]) -> None:
        """Tell how many records no rank could encode; UserError on every rank where they are too many."""
        count, total = len(set().union(*self.place.gathered(bad))), len(self.index)
        allowed = self.config.data.max_faults
        told = f"{count:,} could not be encoded, as {self.config.folder / 'faults'}/cache-rank-*.jsonl list"
        if count > allowed * total:
            asked = f"at most {allowed:.2%} of {total:,} records unusable (data.max_faults)"
            raise UserError(asked, told, "mend or remove them, or allow more")
        if count and self.place.first:
            print(f"of {total:,} records {told}")

    def members(self, bucket: int, rank: int = 0, world: int = 1) -> Iterator[int]:
        """One rank's records of a bucket; of one rank alone, all of them."""
        for part, count in enumerate(self.cells.counts[bucket].tolist()):
            for first in range(rank, count, CHUNK * world):
                member = np.arange(first, min(count, first + CHUNK * world), world)
                yield from self.cells.record(bucket, np.full_like(member, part), member).tolist()

    def cuts(self, number: int, target: tuple[int, int]) -> list[Image]:
        """Every cut of a record that a visit can show, with its key."""
        assert self.index.digests is not None, "the index was opened without digests"
        digest = self.index.digests[number].tobytes()
        cuts = self.samples.cuts(number, self.index.record(number), target)
        return [(number, cut, self.cached.image_key(digest, cut)) for cut in cuts]

    def ahead(self, wanted: list[Image], readers: ThreadPoolExecutor) -> Iterator[Work]:
        """Micro-batches of images with what is read of them; the next one is read while one is encoded."""
        chunks = batches(wanted, self.config.micro_batch_size)
        works = ((images, readers.map(self.read, images)) for images in chunks)
        return (work for work, _ in pairwise(chain(works, (None,))) if work is not None)

    def read(self, image: Image) -> Tensor | Fault:
        """The pixels of an image's cut, or what is wrong with it."""
        record = self.index.record(image[0])
        try:
            return self.samples.image(image[0], record, image[1])
        except (UserError, OSError) as error:
            return Fault(record.name, error.found if isinstance(error, UserError) else str(error))

    def encode(
        self, images: list[Image], pictures: Iterable[Tensor | Fault], writer: Writer, faults: list[Fault]
    ) -> None:
        """Encode some images of one size; those that cannot be become faults."""
        read = list(pictures)
        faults += [one for one in read if isinstance(one, Fault)]
        good = [(image, one) for image, one in zip(images, read, strict=True) if isinstance(one, Tensor)]
        if not good:
            return
        again: list[int] = []
        moments = self.family.safe_moments(torch.stack([one for _, one in good]), again)  # (B, 2c, h, w)
        self.again += [self.index.name(good[row][0][0]) for row in again]
        if self.config.data.posterior == "mean":
            moments = moments.chunk(2, dim=1)[0]  # (B, c, h, w)
        finite = torch.isfinite(moments).flatten(1).all(1).tolist()
        moments = moments.to(self.family.vae_dtype).cpu()  # what the VAE computed in: nothing is lost
        for row, ((number, _, key), _) in enumerate(good):
            if finite[row]:
                writer.add(key, {"moments": moments[row].clone()})
            else:
                faults.append(Fault(self.index.name(number), "the VAE gives numbers that are not finite"))

    # Both.

    def missing(self, keys: list[bytes]) -> list[bytes]:
        """Those that the store does not have, each once, in their order."""
        keys = list(dict.fromkeys(keys))
        if not keys:
            return []
        return [key for key, there in zip(keys, self.cached.store.has(array(keys)), strict=True) if not there]

    def note(self) -> None:
        """Write down what the run reads, as far as it is there."""
        keys: list[np.ndarray] = []
        if self.cached.captions is not None:
            keys.append(array([self.cached.caption_key(None)]))
            for chunk in batches(range(len(self.index)), CHUNK):
                texts = {text for number in chunk for text in self.texts(number)}
                keys.append(array([self.cached.caption_key(text) for text in texts]))
        if self.cached.images is not None:
            for bucket, size in enumerate(self.cells.sizes):
                for chunk in batches(self.members(bucket), CHUNK):
                    keys.append(array([key for number in chunk for *_, key in self.cuts(number, size)]))
        found = np.unique(np.concatenate(keys), axis=0)
        found = found[self.cached.store.has(found)]
        folder = str(self.config.folder.absolute())
        self.cached.store.note_use(self.use, found, {"run": folder, "wish": self.wish})


def encode(config: Config) -> Path:
    """The whole of `sfumato cache`, on all ranks; the folder of the store."""
    if config.data.cache == "none":
        raise UserError(
            "to encode before training", 'data.cache = "none"', "set data.cache=both, images or captions"
        )
    place, plan = start.begin(config)
    if place.first:
        run.write_records(config, place.world, str(place.device), plan.index)
    fill(config, plan.index, plan.cells, start.load_family(config, place), place)
    return config.data.store


def prune(folder: Path, tell: Callable[[str], None] = print) -> tuple[int, int]:
    """Free what no run needs whose folder is still there; records and bytes that were freed.

    Class images that were drawn for runs are records, too.
    """
    store = Store(folder)
    kept = []
    for use in list(store.uses()):
        if Path(use.facts["run"]).is_dir():
            kept.append(use)
        else:
            store.drop_use(use.name)
            tell(f"the run {use.facts['run']} is gone")
    pictures, freed = prior.prune(folder, tell)
    records, more = store.prune(use.keys() for use in kept)
    return pictures + records, freed + more


def array(keys: Iterable[bytes]) -> np.ndarray:
    """Keys as (n, 16) uint8."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)


def batches(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` values, the last one shorter."""
    values = iter(values)
    while found := list(islice(values, size)):
        yield found


def write_faults(path: Path, faults: list[Fault]) -> None:
    """Write a list of faults, or take an older one away."""
    path.unlink(missing_ok=True)
    if faults:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(fault._asdict()) + "\n" for fault in dict.fromkeys(faults)]
        path.write_text("".join(lines), encoding="utf-8")
