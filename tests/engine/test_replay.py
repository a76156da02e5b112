"""`sfumato replay`: a batch that a run left out computes to the same numbers again, for every method."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.cli import main
from sfumato.config import parse
from sfumato.errors import UserError
from sfumato.objective import Objective
from tests.engine import runs
from tests.engine.ranks import run_ranks
from tests.engine.test_controlnet import write_pairs

METHODS: dict[str, dict[str, Any]] = {
    "full": {"engine__zero_stage": 2, "engine__precision": "bf16"},
    "lora": {
        "method": {"kind": "lora", "rank": 2, "dropout": 0.5}, "engine__gradient_checkpointing": "selective",
    },
    "controlnet": {"method": {"kind": "controlnet"}, "data__conditioning_column": "hint"},
    "textual_inversion": {
        "method": {"kind": "textual_inversion", "like": "red"}, "data__caption_prefix": "<new> in ",
    },
}  # fmt: skip


def planted(config: Any, *batches: int) -> Path:
    """A run in which the loss of each batch's first sample is infinite."""
    from sfumato.train import train

    true, calls = Objective.losses, iter(range(1000))

    def losses(self: Any, *args: Any) -> Any:
        found = true(self, *args)
        batch, micro = divmod(next(calls), 2)
        return found + torch.tensor([float("inf"), 0.0]) if batch in batches and micro == 0 else found

    Objective.losses = losses  # type: ignore[method-assign]
    try:
        return train(config)
    finally:
        Objective.losses = true  # type: ignore[method-assign]


def replayed(folder: Path) -> tuple[bool, list[str]]:
    """What `sfumato replay` says."""
    from sfumato.replay import replay

    lines: list[str] = []
    return replay(folder, lines.append), lines


def both_ways(light: dict[str, Any]) -> list[tuple[list[Any], Any, dict[str, torch.Tensor]]]:
    """Two steps undone because of batch 3, and batches 2 and 3 left out: steps told, left out, weights."""
    found = []
    for name, policy, batches in (("back", "rollback", (3,)), ("skipped", "skip", (2, 3))):
        values = light | {"name": name, "steps": 4, "bad_numbers": {"policy": policy}}
        values["checkpoint"] = light["checkpoint"] | {"every": 2}
        run = planted(parse(values), *batches).parent
        told = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        state = json.loads((run / "checkpoints" / "step-000004" / "manifest.json").read_text())
        found.append((told, (state["position"], state["left_out"]), runs.tensors_of(run)))
    return found


def everything(jobs: list[dict[str, Any]], diverging: dict[str, Any]) -> tuple[Any, ...]:
    """All of it in one process."""
    runs.without_exports()
    found = []
    for values in jobs:
        run = planted(parse(values), 2).parent
        told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append((told, replayed(run / "bad" / "step-000002")))
    try:
        runs.train_here(diverging)
        message = "it did not stop"
    except UserError as error:
        message = str(error)
    folder = Path(diverging["output"]) / diverging["name"]
    again = replayed(next((folder / "bad").iterdir()))
    shutil.rmtree(folder / "checkpoints")
    at_first = replayed(next((folder / "bad").iterdir()))
    return found, message, again, at_first, both_ways(jobs[[*METHODS].index("lora")])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    runs.write_model("sd", folder / "sd")
    write_pairs(folder / "pictures", 0)
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> tuple[Any, ...]:
    """Each method's log and what is said of its bad batch; the end of a run that diverges, and its batch."""
    light: dict[str, Any] = {
        "steps": 3, "ema__enabled": False, "checkpoint__every": 1, "checkpoint__keep": 9,
        "checkpoint__export": False,
    }  # fmt: skip
    jobs = [
        runs.settings(place, name=name, bad_numbers__policy="skip", **light, **changes)
        for name, changes in METHODS.items()
    ]
    diverging = runs.settings(
        place, name="diverging", optimizer={"name": "sgd", "lr": 1e30, "weight_decay": 0.0},
        engine__gradient_checkpointing=True, **light,
    )  # fmt: skip
    [(found, *rest)] = run_ranks(everything, 1, jobs, diverging, timeout=280)
    return dict(zip(METHODS, found, strict=True)), *rest


@pytest.mark.parametrize("method", METHODS)
def test_the_same_numbers_come_again(done: Any, method: str) -> None:
    told, (is_finite, lines) = done[0][method]
    assert [line["step"] for line in told] == [1, 2, 3]
    assert [line["left_out"] for line in told] == [0, 0, 1], "the run went on without the batch"
    assert "batch 2, with the weights of the checkpoint 2, the batch's own" in lines[0]
    rows = [line.split() for line in lines[2:6]]
    assert [row[:2] for row in rows] == [["0", "0"], ["0", "0"], ["0", "1"], ["0", "1"]]
    then, now = [row[3] for row in rows], [row[4] for row in rows]
    assert then[0] == "inf" and now[0] != "inf", "the fault was the test's, not the batch's"
    assert then[1:] == now[1:] and len({*now}) == 4, f"other losses: {then}, {now}"
    assert is_finite and lines[-1] == "every number is finite"


def test_a_run_that_diverges_stops_and_can_be_looked_at(done: Any) -> None:
    _, message, (is_finite, lines), *_ = done
    assert "4 of 4 samples" in message and "diverged" in message and "sfumato replay" in message
    assert not is_finite and lines[-1] == "not finite again"
    assert "the batch's own" in lines[0], "the run saved before it ended"
    assert any(line.startswith("the first output that is not finite: unet.") for line in lines)
    assert any(line.startswith("gradients that are not finite, 208 in all: unet.") for line in lines)


def test_without_checkpoints_the_first_weights_are_taken(done: Any) -> None:
    _, _, _, (is_finite, lines), _ = done
    assert is_finite and "with the weights that the run starts from, which are" in lines[0]


def test_rollback_ends_where_the_batches_had_never_been(done: Any) -> None:
    """Weights and optimizer go back to step 2 bit for bit, and the data go on behind batch 3."""
    (told, (position, left_out), weights), (_, (reference, _), others) = done[-1]
    assert told == [1, 2, 3, 4] and position == reference == 6
    assert [(entry["position"], entry["batches"]) for entry in left_out] == [(2, 2)]
    assert all(torch.equal(weights[name], other) for name, other in others.items())


def test_the_command(done: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = place / "runs" / "lora" / "bad" / "step-000002"
    (file,) = bad.glob("*.safetensors")
    facts = json.loads((bad / "batch.json").read_text())
    assert main(["replay", str(bad)]) == 0
    assert "every number is finite" in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[:-8])
    assert main(["replay", str(bad)]) == 2
    (bad / "batch.json").write_text(json.dumps(facts | {"format": 0}))
    assert main(["replay", str(bad)]) == 2
    assert main(["replay", str(place)]) == 2
    said = capsys.readouterr().err
    assert "it cannot be read" in said and "its format is 0" in said and "no batch.json" in said
