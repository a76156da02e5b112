"""Where a run goes on: the newest whole checkpoint, under settings that may differ, each of which is told."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato import run
from sfumato.config import Config, parse
from sfumato.engine import published, saved
from sfumato.engine.ranks import Ranks
from sfumato.errors import UserError
from sfumato.models.folder import examine
from tests.unit import twins
from tests.unit.test_saved import RANK, edit, flip, write_checkpoint

ALONE = Ranks(0, 1, torch.device("cpu"))


def config(place: Path, **changes: Any) -> Config:
    """Changes are dotted with double underscores."""
    values: dict[str, Any] = {
        "name": "mine",
        "output": str(place),
        "steps": 100,
        "batch_size": 4,
        "micro_batch_size": 2,
        "model": {"weights": "base"},
        "data": {"source": "pictures"},
    }
    for key, value in changes.items():
        *tables, leaf = key.split("__")
        at = values
        for table in tables:
            at = at.setdefault(table, {})
        at[leaf] = value
    return parse(values)


def save(asked: Config, step: int, data: str = "data") -> Path:
    return write_checkpoint(asked.folder / "checkpoints", step, asked.model_dump(mode="json"), data)


def latest(asked: Config, data: str = "data") -> tuple[int | None, list[str]]:
    """The step that is taken, and what was told."""
    told: list[str] = []
    found = run.latest(asked, data, ALONE, told.append)
    return found.step if found else None, told


def test_a_new_run_begins_at_nothing(tmp_path: Path) -> None:
    assert latest(config(tmp_path)) == (None, [])


def test_damaged_ones_are_set_aside_and_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    asked = config(tmp_path)
    paths = [save(asked, step) for step in (10, 20, 30, 40)]
    flip(paths[2] / RANK, -1)
    (paths[3] / "manifest.json").unlink()
    (paths[3].parent / ".step-000050.part").mkdir()
    step, told = latest(asked)
    assert step == 20
    text = "\n".join(told)
    for part in ("step-000050, half written", "step-000040.damaged: manifest.json is missing",
                 f"step-000030.damaged: {RANK} does not hold", "goes on from step-000020"):  # fmt: skip
        assert part in text
    names = sorted(path.name for path in paths[0].parent.iterdir())
    assert names == ["step-000010", "step-000020", "step-000030.damaged", "step-000040.damaged"]
    assert latest(asked) == (20, ["goes on from step-000020"])


def test_a_run_never_begins_anew_by_itself(tmp_path: Path) -> None:
    asked = config(tmp_path)
    flip(save(asked, 10) / RANK, -1)
    for _ in range(2):  # the second start finds nothing but what the first one set aside
        with pytest.raises(UserError, match=r"none of its checkpoints is whole: step-000010\.damaged"):
            latest(asked)
    (asked.folder / "checkpoints").rename(asked.folder / "old")
    assert latest(asked) == (None, [])


def test_one_under_another_name_is_not_taken(tmp_path: Path) -> None:
    asked = config(tmp_path)
    save(asked, 10)
    save(asked, 20).rename(asked.folder / "checkpoints" / "step-000030")
    step, told = latest(asked)
    assert step == 10 and "step-000030.damaged: it holds step 20" in told[0]


def test_averages_of_steps_that_were_undone_are_not_mixed_with_those_to_come(tmp_path: Path) -> None:
    asked = config(tmp_path)
    save(asked, 20)
    for step in (10, 20, 30, 40):
        write_checkpoint(asked.folder / "averages", step)
    with pytest.raises(UserError, match="optimizer.lr"):
        latest(config(tmp_path, optimizer__lr=2e-3))
    assert published.steps_in(asked.folder / "averages") == [10, 20, 30, 40], "a start that is refused"
    step, told = latest(asked)
    assert step == 20 and told[1:] == ["averages of step 30, 40 were removed: made anew"]
    assert published.steps_in(asked.folder / "averages") == [10, 20]


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("process 7 on node-3", end="", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PATIENCE", 0.3)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / run.LOCK], stdin=pipe, stdout=pipe
    ) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="process 7 on node-3 does so"), run.alone(tmp_path, ALONE):
            pass
        other.kill()
    for _ in range(2):
        with run.alone(tmp_path, ALONE):
            assert str(os.getpid()) in (tmp_path / run.LOCK).read_text()


def test_another_format_is_left_where_it_is(tmp_path: Path) -> None:
    asked = config(tmp_path)
    path = save(asked, 10)
    (path / "manifest.json").rename(path / "state.json")
    edited = (path / "state.json").read_text().replace('"format": 3', '"format": 2')
    (path / "state.json").write_text(edited)
    with pytest.raises(UserError, match="its format is 2"):
        latest(asked)
    assert path.is_dir()


def test_a_damaged_export_costs_no_step(tmp_path: Path) -> None:
    asked = config(tmp_path)
    path = save(asked, 10)
    (path / "export").mkdir()
    saved.write(path / "export" / "model.safetensors", {"a": torch.ones(3)})
    (path / "export" / "README.md").write_text("as written")
    told = published.read_manifest(path)
    published.write_manifest(path, told | {"export": published.listed(path / "export")})
    (path / "export" / "README.md").write_text("as its user changed it")
    assert latest(asked) == (10, ["goes on from step-000010"])
    flip(path / "export" / "model.safetensors", -1)
    step, lines = latest(asked)
    assert step == 10 and "export.damaged: model.safetensors does not hold" in lines[0]
    assert (path / "export.damaged" / "README.md").is_file()
    assert latest(asked) == (10, ["goes on from step-000010"])


class Late(NamedTuple):
    """One of two ranks in threads; the second one is held up after each exchange."""

    rank: int
    said: list[Any]
    meeting: Barrier
    world: int = 2

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        self.meeting.wait()
        found = [*self.said]
        self.meeting.wait()
        time.sleep(0.3 * self.rank)
        return found


def test_a_damaged_export_is_set_aside_by_all_ranks_together(tmp_path: Path) -> None:
    """The first one renames it while the second one may not have looked."""
    path = save(config(tmp_path), 10)
    (path / "export").mkdir()
    saved.write(path / "export" / "model.safetensors", {"a": torch.ones(3)})
    told = published.read_manifest(path)
    published.write_manifest(path, told | {"export": published.listed(path / "export")})
    flip(path / "export" / "model.safetensors", -1)
    said, meeting = [None, None], Barrier(2, timeout=30)
    with ThreadPoolExecutor(2) as ranks:
        places: Any = [Late(rank, said, meeting) for rank in (0, 1)]
        found = [*ranks.map(lambda place: run.whole(path, place, run.silent), places)]
    assert [each.step for each in found if each] == [10, 10]


HARMLESS = {
    "steps": 200,
    "micro_batch_size": 1,
    "engine__zero_stage": 3,
    "data__workers": 9,
    "data__cache": "captions",
    "checkpoint__keep": 9,
    "model__weights": "moved",
    "time_limit": 60.0,
}


def test_attention_that_was_chosen_and_is_kept_is_no_change(tmp_path: Path) -> None:
    """A checkpoint has what "fastest" became."""
    save(config(tmp_path, engine__attention={"mid_block.attn1": "_native_math"}), 10)
    assert latest(config(tmp_path, engine__attention="fastest")) == (10, ["goes on from step-000010"])
    _, told = latest(config(tmp_path, engine__attention="native"))
    assert len(told) == 2 and told[1].startswith("changed: engine.attention: {'mid_block.attn1'")
    save(config(tmp_path, engine__attention="native"), 20)
    _, told = latest(config(tmp_path, engine__attention="fastest"))
    assert told[1:] == ["changed: engine.attention: 'native' -> 'fastest'"]


def test_harmless_changes_are_told_one_line_each(tmp_path: Path) -> None:
    before = config(tmp_path)
    save(before, 10)
    assert latest(before) == (10, ["goes on from step-000010"])
    step, told = latest(config(tmp_path, **HARMLESS))
    assert step == 10 and len(told) == 1 + len(HARMLESS)
    for name in HARMLESS:
        [line] = [line for line in told if line.startswith(f"changed: {name.replace('__', '.')}: ")]
    assert "changed: steps: 100 -> 200" in told and "changed: time_limit: None -> 60.0" in told


HARMFUL: list[dict[str, Any]] = [
    {"optimizer__lr": 2e-3},
    {"engine__precision": "fp32"},
    {"seed": 5},
    {"batch_size": 2},
    {"ema__decay": 0.5},
    {"data__flip": True},
    {"objective__weight": "min_snr"},
    {"model__from_scratch": True},
]


@pytest.mark.parametrize("change", HARMFUL, ids=lambda change: next(iter(change)))
def test_harmful_changes_are_refused_unless_named(tmp_path: Path, change: dict[str, Any]) -> None:
    save(config(tmp_path), 10)
    with pytest.raises(UserError, match="another name") as error:
        latest(config(tmp_path, **change))
    name = next(iter(change)).replace("__", ".")
    assert error.value.found.startswith(name) and name in error.value.do
    named = error.value.do.split("checkpoint.accept = ")[1].strip('[]"')
    step, told = latest(config(tmp_path, **change, checkpoint__accept=[named]))
    assert step == 10 and len(told) == 2 and told[1].startswith(f"changed: {named}: ")
    with pytest.raises(UserError, match="another name"):
        latest(config(tmp_path, **change, checkpoint__accept=["optimizer.eps"]))


def test_the_length_of_a_falling_rate_is_no_free_choice(tmp_path: Path) -> None:
    save(config(tmp_path, optimizer__schedule="cosine"), 10)
    longer: dict[str, Any] = {"steps": 200, "optimizer__schedule": "cosine"}
    with pytest.raises(UserError, match="steps: 100 -> 200"):
        latest(config(tmp_path, **longer))
    assert latest(config(tmp_path, **longer, checkpoint__accept=["steps"]))[0] == 10
    with pytest.raises(UserError, match="step 10, beyond steps = 5"):
        latest(config(tmp_path, steps=5, optimizer__schedule="cosine", checkpoint__accept=["steps"]))


def test_other_data_are_refused_unless_named(tmp_path: Path) -> None:
    save(config(tmp_path), 10)
    with pytest.raises(UserError, match="the data are not those"):
        latest(config(tmp_path), "others")
    step, told = latest(config(tmp_path, checkpoint__accept=["data"]), "others")
    assert step == 10 and "data" in told[1]


def test_other_numbers_in_what_does_not_learn_are_refused_unless_named(tmp_path: Path) -> None:
    asked = config(tmp_path)
    path = save(asked, 10)
    said: list[str] = []
    assert run.latest(asked, "data", ALONE, said.append, "these"), "an older checkpoint does not know"
    published.write_manifest(path, published.read_manifest(path) | {"frozen": "these"})
    assert run.latest(asked, "data", ALONE, said.append, "these")
    with pytest.raises(UserError, match=r"(?s)frozen: what does not learn.*accept = \[\"frozen\"\]"):
        run.latest(asked, "data", ALONE, said.append, "others")
    accepted = config(tmp_path, checkpoint__accept=["frozen"])
    assert run.latest(accepted, "data", ALONE, said.append, "others")
    assert "changed: frozen: what" in said[-1]


def test_what_does_not_learn_is_known_by_its_numbers(tmp_path: Path) -> None:
    """Wherever it lies, and whatever learns."""
    for name in ("one", "two", "vae", "unet"):
        twins.write("sd", tmp_path / name)
    for part in ("vae", "unet"):
        change(tmp_path / part / part / "diffusion_pytorch_model.safetensors")

    def told(weights: str, **changes: Any) -> str:
        asked = config(tmp_path, model__weights=str(tmp_path / weights), **changes)
        return run.frozen(asked, examine(asked.model), ALONE)

    config_file = tmp_path / "two" / "vae" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"_diffusers_version": "9"}))
    assert told("one") == told("two") == told("unet") != told("vae")
    assert told("one", model__vae=str(tmp_path / "vae" / "vae")) == told("vae")
    lora = {"method__kind": "lora"}
    assert told("one", **lora) == told("two", **lora) != told("unet", **lora)


def change(file: Path) -> None:
    """Other numbers in a file of weights."""
    save_file({name: numbers + 1 for name, numbers in load_file(file).items()}, file)


def test_an_adapter_stays_with_its_base(tmp_path: Path) -> None:
    lora: dict[str, Any] = {"method__kind": "lora", "method__rank": 4}
    save(config(tmp_path, **lora), 10)
    with pytest.raises(UserError, match="model.weights: 'base' -> 'other'"):
        latest(config(tmp_path, **lora, model__weights="other"))
    with pytest.raises(UserError, match=r"method\.rank: 4 -> 8") as error:
        latest(config(tmp_path, **lora | {"method__rank": 8}))
    assert error.value.found.count("method.") == 1, "one line for one change"
    with pytest.raises(UserError, match=r"method\.kind: 'lora' -> 'full'"):
        latest(config(tmp_path))


def test_a_setting_that_the_checkpoint_does_not_know_had_its_default(tmp_path: Path) -> None:
    asked = config(tmp_path)
    path = save(asked, 10)
    told = published.read_manifest(path)
    del told["config"]["bad_numbers"], told["config"]["ema"]["warmup"]
    published.write_manifest(path, told)
    assert latest(asked) == (10, ["goes on from step-000010"])


def test_names_in_accept_are_looked_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='no setting is called that(.|\n)*write "optimizer.lr"'):
        latest(config(tmp_path, checkpoint__accept=["optimizer.Ir"]))
    save(config(tmp_path), 10)
    step, told = latest(config(tmp_path, checkpoint__accept=["optimizer.lr"]))
    assert step == 10 and told[1:] == ["checkpoint.accept names optimizer.lr, which did not change"]


def test_a_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    """A changed learning rate in the manifest would let a harmful change pass."""
    asked = config(tmp_path)
    save(asked, 10)
    edit(save(asked, 20), '"lr": 1e-05', '"lr": 2e-05')
    assert latest(asked)[0] == 10


@pytest.mark.parametrize(
    ("said", "world", "stage"),
    [
        ({"precision": "fp32"}, 1, 0),
        ({"precision": "fp32"}, 2, 1),
        ({"precision": "bf16"}, 1, 1),
        ({"precision": "fp32", "zero_stage": 1}, 1, 1),
        ({"precision": "fp32", "zero_stage": 3}, 1, 3),
        ({"precision": "fp32", "offload_optimizer": "cpu"}, 1, 1),
        ({"precision": "fp32", "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}}}, 1, 1),
        ("auto", 1, 1),
    ],
)
def test_a_stage_left_open_is_0_only_where_nothing_is_shared(said: Any, world: int, stage: int) -> None:
    values = {"steps": 1, "batch_size": 2, "model": {"weights": "w"}, "data": {"source": "d"}, "engine": said}
    assert parse(values).on(world).engine.zero_stage == stage
