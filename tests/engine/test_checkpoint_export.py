"""Each checkpoint holds what its users load; the run does not feel it, and no half of one is ever seen."""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from sfumato import export as exports
from sfumato import models
from sfumato.config import Config, parse
from sfumato.engine import checkpoint, size
from sfumato.errors import UserError
from sfumato.models.family import Family
from sfumato.models.folder import examine, weight_files
from tests.engine import runs, toys
from tests.engine.ranks import fork_server, run_ranks
from tests.engine.test_training import LIMIT, alone, check_same_bits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    runs.write_model("sd", folder / "sd")
    runs.write_pictures(folder / "pictures")
    return folder


@pytest.fixture(scope="module")
def left(place: Path) -> dict[str, Path]:
    """Runs on two ranks: one at each stage, and one whose checkpoints hold no export."""
    changes: dict[str, dict[str, Any]] = {
        f"stage-{n}": {"engine__zero_stage": n, "steps": 2 if n == 1 else 1} for n in range(4)
    }
    changes["without"] = {"checkpoint__export": False, "steps": 2}
    jobs = [
        runs.settings(place, name=name, checkpoint__every=1, batch_size=2, micro_batch_size=1, **change)
        for name, change in changes.items()
    ]
    run_ranks(runs.train_all, 2, jobs, timeout=LIMIT)
    return {name: place / "runs" / name for name in changes}


def check_export(folder: Path, step: int, saved: checkpoint.Saved) -> None:
    """Fail unless a folder holds the average of a checkpoint, whole."""
    facts = json.loads((folder / "sfumato.json").read_text())
    assert (facts["step"], facts["weights"], facts["kind"]) == (step, "ema", "full")
    found = runs.load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    check_same_bits(
        {f"unet.{name}": tensor for name, tensor in found.items()},
        {name: saved.whole("ema", name) for name in saved.parameters},
    )
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file()


def test_at_every_stage_a_checkpoint_holds_its_export(left: dict[str, Path]) -> None:
    for stage in range(4):
        run = left[f"stage-{stage}"]
        steps = checkpoint.steps_in(run / "checkpoints")
        for step in steps:
            saved = checkpoint.Saved(checkpoint.path_of(run / "checkpoints", step))
            check_export(saved.path / "export", step, saved)
        check_export(run / "export", steps[-1], saved)
        file = Path("unet") / "diffusion_pytorch_model.safetensors"
        assert (run / "export" / file).samefile(saved.path / "export" / file), "it was made twice"
    one, two = (left["stage-1"] / "checkpoints" / f"step-00000{step}" for step in (1, 2))
    with pytest.raises(AssertionError, match="differ"):
        check_export(one / "export", 1, checkpoint.Saved(two))
    assert not [path for run in left.values() for path in run.rglob("*.part")]


def test_every_stage_exports_the_same(left: dict[str, Path]) -> None:
    """After one step on two ranks; a second one would be seen."""
    one, two = (left["stage-1"] / "checkpoints" / f"step-00000{step}" for step in (1, 2))
    first = runs.exported(left["stage-0"])
    for other in (one, left["stage-2"], left["stage-3"]):
        assert toys.distance(runs.exported(other), first) < 1e-6
    assert toys.distance(runs.exported(two), first) > 1e-6


def test_the_plan_counts_it(place: Path, left: dict[str, Path]) -> None:
    """The room that is asked for is what a checkpoint takes."""
    for name in ("stage-1", "without"):
        config = parse(json.loads((left[name] / "resolved.json").read_text()))
        facts = examine(config.model)
        numbers = size.count(weight_files(facts.folder, "unet"))
        room = size.checkpoint_bytes(config, facts, numbers)
        folder = left[name] / "checkpoints" / "step-000002"
        taken = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        assert 0.9 < taken / room < 1.1, f"{name}: {taken} bytes, {room} were asked for"


def test_a_run_does_not_feel_it(left: dict[str, Path]) -> None:
    with_it, without = left["stage-1"], left["without"]
    assert not (without / "checkpoints" / "step-000002" / "export").exists()
    check_export(without / "export", 2, checkpoint.Saved(without / "checkpoints" / "step-000002"))
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        check_same_bits(runs.tensors_of(with_it, kind), runs.tensors_of(without, kind))
    curves = [[m["loss"] for m in runs.metrics(run)] for run in (with_it, without)]
    assert curves[0] == curves[1]


@pytest.fixture
def bare(left: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint without an export, as it is before it is published."""
    return Path(shutil.copytree(left["without"] / "checkpoints" / "step-000002", tmp_path / ".step-2.part"))


def put_into(folder: Path, tell: Callable[[str], None]) -> Callable[[Path], None]:
    config, family = config_of(folder)
    return exports.inside(config, family, tell)


def config_of(folder: Path) -> tuple[Config, Family]:
    config = parse(checkpoint.Saved(folder).state["config"])
    return config, models.load(config.model, CPU, torch.float32, torch.float32)


def check_undisturbed(folder: Path) -> None:
    """Fail unless making an export leaves all random numbers and the live parts as they are."""
    config, family = config_of(folder)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    parts = {name: id(part) for name, part in family.parts().items()} | {"vae": id(family.vae)}
    numbers = [p.clone() for p in family.vae.parameters()]
    exports.inside(config, family, pytest.fail)(folder)
    assert (folder / "export" / "sfumato.json").is_file()
    assert torch.equal(torch.get_rng_state(), before[0]), "random numbers of torch were used"
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert parts == {name: id(part) for name, part in family.parts().items()} | {"vae": id(family.vae)}
    assert all(torch.equal(a, b) for a, b in zip(numbers, family.vae.parameters(), strict=True))


def test_it_disturbs_nothing(bare: Path) -> None:
    check_undisturbed(bare)


def test_random_numbers_that_it_uses_are_caught(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exports.write

    def drawing(*args: Any) -> None:
        torch.rand(1)  # as a module does that is built with random numbers
        write(*args)

    monkeypatch.setattr(exports, "write", drawing)
    with pytest.raises(AssertionError, match="random numbers"):
        check_undisturbed(bare)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within it the system refuses to let any file grow larger, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_room_the_checkpoint_stays_and_is_told_once(bare: Path) -> None:
    told: list[str] = []
    put = put_into(bare, told.append)
    with files_of_at_most(30_000):
        put(bare)
        put(bare)
    assert len(told) == 1 and "step-2" in told[0] and "no export" in told[0], told
    assert sorted(path.name for path in bare.iterdir() if not path.name.startswith("rank")) == [
        "manifest.json"
    ]
    put(bare)
    check_export(bare / "export", 2, checkpoint.Saved(bare))


def train_without_vae(values: dict[str, Any]) -> tuple[str, str]:
    """Train while the VAE's file is away, once it was read; what was printed, and how it ended."""
    from sfumato import train as loop

    vae = Path(values["model"]["weights"]) / "vae" / "diffusion_pytorch_model.safetensors"
    ready = loop.inside

    def inside(*args: Any) -> Callable[[Path], None]:
        vae.rename(vae.with_suffix(".away"))
        return ready(*args)

    loop.inside = inside
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            runs.train_here(values)
            ended = "well"
        except UserError as error:
            ended = str(error)
    vae.with_suffix(".away").rename(vae)
    return said.getvalue(), ended


def test_a_run_goes_on_without_its_exports(place: Path) -> None:
    shutil.copytree(place / "sd", place / "damaged")
    values = runs.settings(place, "damaged", name="damaged", steps=2, checkpoint__every=1)
    [(said, ended)] = run_ranks(train_without_vae, 1, values, timeout=LIMIT)
    folder = place / "runs" / "damaged"
    assert said.count("no export") == 1 and "step-000001" in said, said
    assert checkpoint.steps_in(folder / "checkpoints") == [1, 2]
    assert str(place / "damaged" / "vae") in ended and not (folder / "export").exists()
    exports.export(folder)
    check_export(folder / "export", 2, checkpoint.Saved(folder / "checkpoints" / "step-000002"))


def standing_still(values: dict[str, Any]) -> None:
    """Train, and stop the process in the middle of the third checkpoint's export."""
    write = exports.card.write

    def halted(folder: Path, *told: Any) -> None:
        if "step-000003" in str(folder):
            os.kill(os.getpid(), signal.SIGSTOP)
        write(folder, *told)

    exports.card.write = halted
    alone(values)


def test_killed_while_an_export_is_written(place: Path) -> None:
    values = runs.settings(place, name="killed", steps=3, checkpoint__every=1, checkpoint__keep=9)
    folder = place / "runs" / "killed" / "checkpoints"
    process = fork_server().Process(target=standing_still, args=(values,))
    process.start()
    end = time.monotonic() + LIMIT
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.exitcode is None and time.monotonic() < end, "it never came to write"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.join(60)
    assert [*folder.glob(".step-000003.part/.export.part/*/*.safetensors")], "no half of an export is there"
    assert checkpoint.steps_in(folder) == [1, 2]
    for step in (1, 2):
        saved = checkpoint.Saved(checkpoint.path_of(folder, step))
        check_export(saved.path / "export", step, saved)
    run_ranks(runs.train_here, 1, values, timeout=LIMIT)
    assert checkpoint.steps_in(folder) == [1, 2, 3] and not [*folder.glob(".*")]
    check_export(folder.parent / "export", 3, checkpoint.Saved(folder / "step-000003"))


def test_an_export_on_demand(left: dict[str, Path], tmp_path: Path) -> None:
    run, other = left["stage-1"], tmp_path / "live"
    exports.export(run, other, dtype="bf16", weights="live")
    facts = json.loads((other / "sfumato.json").read_text())
    assert (facts["weights"], facts["dtype"]) == ("weight", "bf16")
    found = runs.load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    live = runs.tensors_of(run)
    assert all(torch.equal(t, live[f"unet.{name}"].bfloat16()) for name, t in found.items())
    (run / "export" / "mine.txt").write_text("kept elsewhere")
    file = Path("unet") / "diffusion_pytorch_model.safetensors"
    exports.export(run, anew=True)
    assert not (run / "export" / file).samefile(run / "checkpoints" / "step-000002" / "export" / file)
    check_export(run / "export", 2, checkpoint.Saved(run / "checkpoints" / "step-000002"))
    with pytest.raises(UserError, match="something else"):
        exports.export(run, run / "checkpoints")
    with files_of_at_most(30_000), pytest.raises(UserError, match="(?s)could not be written.*make room"):
        exports.export(run, anew=True)
    check_export(run / "export", 2, checkpoint.Saved(run / "checkpoints" / "step-000002"))
    assert not [*run.glob(".export*")]


def test_an_export_takes_no_place_that_is_not_its_own(
    left: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the checkpoint and the place are spelled; what lies there stays as it is."""
    run, other = (shutil.copytree(left[name], tmp_path / name) for name in ("stage-1", "without"))
    step = run / "checkpoints" / "step-000001"
    own = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for here, to, found in (
        (tmp_path, other / "export", "another run, without"),
        (tmp_path, other / "export" / "unet" / "..", "another run, without"),
        (tmp_path, step / "export", "a checkpoint's own"),
        (step, Path("export"), "a checkpoint's own"),
        (step, Path("../../checkpoints"), "something else"),
        (step, Path("."), "that you are in"),
        (step, Path("x/../.."), "one above it"),
    ):
        monkeypatch.chdir(here)
        for write in (exports.export, exports.ready):
            with pytest.raises(UserError, match=found):
                write(run, to)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == own
    for here, asked in ((step, "."), (step.parent, step.name), (step / "export", "..")):
        shutil.rmtree(run / "export")
        monkeypatch.chdir(here)
        assert exports.ready(Path(asked)) == exports.export(Path(asked))
        assert json.loads((run / "export" / "sfumato.json").read_text())["step"] == 1
    (tmp_path / "link").symlink_to(step)
    monkeypatch.chdir(tmp_path)
    assert exports.export(Path("link")) == run / "export"
    assert exports.export(run, tmp_path / "mine") == exports.export(run, tmp_path / "mine")
    taken = {path.relative_to(step): path.stat().st_mtime_ns for path in step.rglob("*")}
    assert taken == {path.relative_to(step): own[path] for path in step.rglob("*")}


def test_a_disk_without_links_gets_copies(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    (tmp_path / "one").write_text("x")
    target = shared / f"sfumato-{os.getpid()}"
    try:
        exports.link(str(tmp_path / "one"), str(target))
        assert target.read_text() == "x" and not target.samefile(tmp_path / "one")
    finally:
        target.unlink(missing_ok=True)
