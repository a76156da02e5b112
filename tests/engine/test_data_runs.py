"""Every layout trains, in buckets, live and from the cache, on one rank and two, to the same losses."""

import contextlib
import io
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sfumato import cache
from sfumato.config import parse
from sfumato.data.store import Store
from sfumato.errors import UserError
from sfumato.models.family import Family
from tests.engine import runs
from tests.engine.layouts import LAYOUTS, laion, records
from tests.engine.ranks import RankError, as_users_start_it, fork_server, run_ranks

COUNT = 24
BUCKETS = {"min": 48, "max": 96, "step": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    runs.write_model("sdxl", folder / "sdxl")
    told = records(COUNT)
    data = {name: write(folder / name, told) for name, write in LAYOUTS.items()}
    (folder / "data.json").write_text(json.dumps(data))
    return folder


def settings(place: Path, layout: str, name: str, **changes: Any) -> dict[str, Any]:
    """A run over one layout in buckets, which drops, flips and shuffles."""
    values = runs.settings(place, "sdxl", name=name, steps=3, ema__enabled=False, **changes)
    asked = json.loads((place / "data.json").read_text())[layout]
    values["data"] |= asked | {"resolution": 64, "buckets": BUCKETS, "flip": True, "views": 3, "workers": 0}
    values["data"] |= {
        key.removeprefix("data__"): v for key, v in changes.items() if key.startswith("data__")
    }
    return values


def several(jobs: list[dict[str, Any]]) -> list[list[float]]:
    """The losses of some runs, one after another in the same ranks."""
    runs.without_exports()
    return [[line["loss"] for line in runs.metrics(runs.train_here(values).parent)] for values in jobs]


def train(jobs: list[dict[str, Any]], world: int = 1) -> list[list[float]]:
    return run_ranks(several, world, jobs, timeout=280)[0]  # type: ignore[no-any-return]


def check_same(losses: dict[str, list[float]]) -> None:
    first = next(iter(losses.values()))
    assert len(first) == 3 and len(set(first)) == 3
    for name, found in losses.items():
        assert found == pytest.approx(first, abs=1e-5), f"{name} has other losses: {found}, not {first}"


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, list[float]]:
    """The losses on one rank, by layout and what is cached."""
    jobs = {
        f"{layout}-{cached}": settings(place, layout, f"{layout}-{cached}", data__cache=cached)
        for layout in LAYOUTS
        for cached in ("none", "both")
    }
    return dict(zip(jobs, train(list(jobs.values())), strict=True))


def test_every_layout_trains_live_and_cached_to_the_same_losses(alone: dict[str, list[float]]) -> None:
    """The records are the same, so are their numbers: eight runs with one curve."""
    assert len(alone) == 8
    check_same(alone)


def test_two_ranks_read_what_one_does_from_any_cache(place: Path, alone: dict[str, list[float]]) -> None:
    asked = ("none", "images", "captions", "both")
    jobs = [settings(place, "laion_sx", f"two-{cached}", data__cache=cached) for cached in asked]
    check_same({"one": alone["laion_sx-none"]} | dict(zip(asked, train(jobs, 2), strict=True)))


def test_a_wrong_cache_is_seen(place: Path, alone: dict[str, list[float]]) -> None:
    """The broken variants: latents of another crop than the numbers', and moments without their variance."""
    for broken in (uncropped_cache, mean_cache):
        values = settings(place, "laion_sx", broken.__name__, data__cache="images")
        values["data"]["store"] = str(place / broken.__name__)
        found = run_ranks(broken, 1, values, timeout=200)[0]
        with pytest.raises(AssertionError, match="other losses"):
            check_same({"live": alone["laion_sx-none"], broken.__name__: found})


def test_a_store_of_means_serves_no_run_that_samples(place: Path, alone: dict[str, list[float]]) -> None:
    asked = (("images", "mean"), ("images", "sample"), ("none", "mean"))
    jobs = [
        settings(place, "laion_sx", f"{posterior}-of-{cached}", data__cache=cached, data__posterior=posterior)
        for cached, posterior in asked
    ]
    for values in jobs:
        values["data"]["store"] = str(place / "means")
    means, samples, live = train(jobs)
    check_same({"live": live, "means": means})
    check_same({"live": alone["laion_sx-none"], "samples": samples})
    assert means != pytest.approx(samples, abs=1e-5)


def test_the_next_pictures_are_read_while_a_batch_is_encoded() -> None:
    begun: list[int] = []
    filler: Any = SimpleNamespace(config=SimpleNamespace(micro_batch_size=2), read=begun.append)
    numbers: Any = [1, 2, 3, 4, 5]
    with ThreadPoolExecutor(1) as readers:
        works = cache.Filler.ahead(filler, numbers, readers)
        assert [*next(works)[0]] == [1, 2]
        readers.submit(int).result()  # when all that was asked for before is done
        assert begun == [1, 2, 3, 4]
        assert [[*images] for images, _ in works] == [[3, 4], [5]]


def uncropped_cache(values: dict[str, Any]) -> list[float]:
    """A cache whose keys do not cover the cut, as peers' do not."""
    from sfumato.data.cached import Cached
    from sfumato.data.store import key_of

    Cached.image_key = lambda self, digest, cut: key_of(digest, *cut.target)  # type: ignore[method-assign]
    return several([values])[0]


def mean_cache(values: dict[str, Any]) -> list[float]:
    """A cache that keeps one latent of each image."""
    moments = Family.safe_moments

    def mean(self: Family, pixels: torch.Tensor, *told: Any) -> torch.Tensor:
        return moments(self, pixels).chunk(2, dim=1)[0]

    Family.safe_moments = mean  # type: ignore[method-assign]
    return several([values])[0]


def without_encoders(values: dict[str, Any]) -> list[float]:
    """Train where neither the VAE nor a text encoder can be loaded."""
    from sfumato.models import family, sdxl

    def refuse(kind: type, *where: Any) -> None:
        raise AssertionError(f"a {kind.__name__} was loaded")

    family.frozen = sdxl.frozen = refuse
    return several([values])[0]


def test_a_whole_cache_needs_no_encoder(place: Path) -> None:
    values = settings(place, "parquet", "whole", data__cache="both")
    fill(values)
    run_ranks(without_encoders, 1, values, timeout=200)
    with pytest.raises(RankError, match="a AutoencoderKL was loaded"):
        run_ranks(
            without_encoders, 1, settings(place, "parquet", "part", data__cache="captions"), timeout=200
        )


def encoded(values: dict[str, Any]) -> dict[str, int]:
    """Fill a cache, and count what was encoded for it."""
    made = {"images": 0, "captions": 0, "loaded": 0}
    safe, load = Family.safe_moments, Family.load

    def images(self: Family, pixels: torch.Tensor, *told: Any) -> torch.Tensor:
        made["images"] += len(pixels)
        return safe(self, pixels, *told)

    def loaded(self: Family, *parts: bool, **named: bool) -> Family:
        family = load(self, *parts, **named)
        encode = family.encode_prompts

        def captions(prompts: list[str]) -> dict[str, torch.Tensor]:
            made["captions"] += len(prompts)
            return encode(prompts)

        family.encode_prompts = captions  # type: ignore[method-assign,assignment]
        return family

    Family.safe_moments, Family.load = images, loaded  # type: ignore[method-assign]
    config = parse(values)
    cache.encode(config)
    made["stored"] = Store(config.data.store).size()[0]
    return made


def fill(values: dict[str, Any], world: int = 1) -> dict[str, int]:
    """What all ranks encoded, and what is stored in the end."""
    results = run_ranks(encoded, world, values, timeout=200)
    return {name: sum(result[name] for result in results) for name in ("images", "captions")} | {
        "stored": results[0]["stored"]
    }


def test_what_changes_is_encoded_anew_and_nothing_else(tmp_path: Path, place: Path) -> None:
    told = records(12)
    told[5] = (*told[5][:3], told[4][3])  # two equal captions
    laion(tmp_path / "set", told)
    (tmp_path / "data.json").write_text(json.dumps({"mine": {"source": str(tmp_path / "set")}}))

    def asked(name: str, **changes: Any) -> dict[str, Any]:
        values = settings(tmp_path, "mine", name, data__cache="both", data__views=None, **changes)
        values["model"]["weights"] = str(place / "sdxl")
        values["data"] |= {"center_crop": True, "flip": False} | {
            key.removeprefix("data__"): v for key, v in changes.items()
        }
        return values

    assert fill(asked("a"), 2) == {"images": 12, "captions": 11 + 1, "stored": 24}, "11 texts and the null"
    assert fill(asked("a")) == {"images": 0, "captions": 0, "stored": 24}, "a second start encodes again"
    assert fill(asked("b"))["images"] == 0, "another run does not share"
    (tmp_path / "set" / "00000" / f"{told[2][0]}.txt").write_text("another caption\n")
    assert fill(asked("a")) == {"images": 0, "captions": 1, "stored": 25}
    image = tmp_path / "set" / "00000" / f"{told[3][0]}.jpg"
    image.write_bytes(told[7][1])
    assert fill(asked("a")) == {"images": 0, "captions": 0, "stored": 25}, "the same bytes are there already"
    image.write_bytes(told[3][1] + b"\0")
    assert fill(asked("a"))["images"] == 1
    assert fill(asked("c", data__resolution=48))["images"] == 12, "a latent of another resolution was reused"
    assert fill(asked("d", data__flip=True))["images"] == 12, "mirrored ones alone are new"
    stored = fill(asked("a"))["stored"]
    for name in ("c", "d"):
        for path in sorted((tmp_path / "runs" / name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "runs" / name).rmdir()
    records_freed, _ = cache.prune(tmp_path / "cache")
    # 12 of the smaller resolution, 12 mirrored, and what the two changed files were before.
    assert stored - records_freed == Store(tmp_path / "cache").size()[0]
    assert 24 <= records_freed <= 26
    assert fill(asked("a")) == {"images": 0, "captions": 0, "stored": stored - records_freed}
    assert fill(asked("d", data__flip=True))["images"] == 12


def strict_and_lenient(values: dict[str, Any]) -> tuple[str, str]:
    """What is said of a cache where an eighth of the records may be faults, and then where a quarter may."""
    with pytest.raises(UserError) as caught:
        cache.encode(parse(values))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cache.encode(parse(values | {"data": values["data"] | {"max_faults": 0.25}}))
    return str(caught.value), said.getvalue()


def test_all_ranks_refuse_what_one_cannot_encode(tmp_path: Path, place: Path) -> None:
    told = records(8)
    for number in (3, 6):  # both are the second rank's
        name, image, *others = told[number]
        told[number] = (name, image[:-200], *others)  # type: ignore[assignment]
    laion(tmp_path / "set", told)
    (tmp_path / "data.json").write_text(json.dumps({"mine": {"source": str(tmp_path / "set")}}))
    values = settings(tmp_path, "mine", "broken", data__cache="images", data__max_faults=0.125)
    values["model"]["weights"] = str(place / "sdxl")
    (strict, lenient), (other, silent) = run_ranks(strict_and_lenient, 2, values, timeout=100)
    assert "2 could not be encoded" in strict and strict == other
    assert "of 8 records 2 could not be encoded" in lenient and "could not be" not in silent
    listed = sorted((tmp_path / "runs" / "broken" / "faults").iterdir())
    assert [file.name for file in listed] == ["cache-rank-1.jsonl"]
    assert len(listed[0].read_text().splitlines()) == 2


def slowly(values: dict[str, Any]) -> None:
    """Fill a cache in shards of four records, each image with a pause, in a process group of its own."""
    os.setsid()
    as_users_start_it()
    writer, safe = Store.writer, Family.safe_moments

    def small(self: Store, owner: str, shard_bytes: int = 0) -> Any:
        return writer(self, owner, 3 * 8 * 8 * 8 * 4)

    def pausing(self: Family, pixels: torch.Tensor, *told: Any) -> torch.Tensor:
        time.sleep(0.2)
        return safe(self, pixels, *told)

    Store.writer, Family.safe_moments = small, pausing  # type: ignore[method-assign]
    cache.encode(parse(values))


def test_a_cache_that_is_killed_loses_the_shard_in_flight(place: Path, tmp_path: Path) -> None:
    values = settings(place, "laion_sx", "killed", data__cache="images", micro_batch_size=1)
    values["data"]["store"] = str(tmp_path / "cache")
    process = fork_server().Process(target=slowly, args=(values,))
    process.start()
    shards, end = tmp_path / "cache" / "shards", time.monotonic() + 120
    while len(list(shards.glob("*.safetensors")) if shards.exists() else []) < 3:
        assert process.exitcode is None and time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    kept = Store(tmp_path / "cache").size()[0]
    assert kept >= 3
    after = fill(values)
    assert after["images"] == after["stored"] - kept, "what was published was encoded again, or is lost"


def test_memory_of_a_batch_is_the_shards(place: Path) -> None:
    """Read back by memory map: a view, not a copy."""
    values = settings(place, "parquet", "mapped", data__cache="images")
    fill(values)
    store = Store(Path(values["data"]["store"]))
    keys = next(use.keys() for use in store.uses() if use.facts["run"].endswith("mapped"))
    first, again = (store.get(np.asarray(keys[0]).tobytes())["moments"] for _ in range(2))
    assert first.data_ptr() == again.data_ptr() and first.dtype == torch.float32
