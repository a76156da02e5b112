"""A run's page: whatever lies in the folder becomes one harmless file, soon, and never an error."""

import json
import os
import random
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato import cli
from sfumato.errors import UserError
from sfumato.report import page
from sfumato.report.page import content
from sfumato.report.page.compare import side_by_side
from sfumato.report.page.record import Record
from sfumato.report.page.single import Story, alone
from sfumato.report.refresh import Refresh
from tests.unit import run_files
from tests.unit.report_pages import Tags, check_harmless, given, hostile_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, which no test changes."""
    return run_files.write(tmp_path_factory.mktemp("whole"), steps=120)


def copied(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place / "copy"))


def test_a_page_tells_all_that_the_run_told(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    path = page.write(folder)
    assert path == folder / "report.html" and not list(folder.glob(".report*"))
    text = path.read_text(encoding="utf-8")
    check_harmless(text)
    told = Tags(text).told
    for words in (
        *("done, 120 of 120 steps", "Base against tuned", "a red fox in the snow", "1 restart"),
        *("The loss jumped once at step 60", "not a picture", "the file is cut short", "photos/7.png"),
        *("64 × 64", "optimizer.lr", "0.0001", "1e-05", "torch", "2.13.0+cpu", "sfumato sample", "mean FPS"),
        *("DiffusionPipeline.from_pretrained(model)", 'model = "export"', "ended: stopped"),
    ):
        assert words in told, words
    assert str(tmp_path) not in told.replace(f"{folder}", ""), "a path of this machine"
    charts = {chart["title"]: chart for chart in given(text, "told")["charts"]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    loss = charts["Training loss"]["series"][0]
    assert loss["x"] == [line["step"] for line in lines]
    assert np.allclose(loss["y"], [line["loss"] for line in lines], rtol=1e-4)
    assert [line["name"] for line in charts["Validation loss"]["series"]] == ["live", "ema"]
    assert len(charts["Validation loss by timestep"]["series"]) == 4
    assert len(charts["Training loss by timestep"]["series"]) == 4
    for title in ("What the captions are worth", "Gradient norm", "Learning rate", "Images per second",
                  "Waiting for data", "Memory", "Goodput"):  # fmt: skip
        assert title in charts, title
    drawn = given(text, "drawn")
    assert drawn["steps"] == [0, 30, 60, 90, 120] and len(drawn["uris"]) == 3


def test_odd_numbers_do_no_harm(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 10**400, "lr": True, "bucket": {"a": "b", "c": 1e999}, "loss_by_timestep": 1},
        {"step": -3, "loss": 1.0}, {"step": 2**60, "loss": 1.0}, {"step": 1.5}, {"step": None}, {},
        {"step": 2**52, "loss": 1e308, "spike": True, "bucket": []}, {"step": 2**52, "loss": 1e308},
        {"step": 3, "loss": -1e308, "time": 1e300, "goodput": "all", "data_stall": None, "x": {}},
    ]  # fmt: skip
    run_files.jsonl(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "starts.jsonl").write_text(
        '{"time": "?", "step": {}}\n{"end": [], "time": 1e99, "step": -1}\n'
    )
    (tmp_path / "validation.jsonl").write_text(
        '{"step": 1, "weights": 7, "quantiles": {"t": 1}, "loss": "x"}\n'
        '{"step": 2, "weights": null, "quantiles": [1, {"t": "a"}, {"t": 1e999}], "gap": 1}\n'
    )
    (tmp_path / "summary.json").write_text('{"a": {"b": [1, {"c": NaN}]}, "seconds": 1e999}')
    text = page.write(tmp_path).read_text(encoding="utf-8")
    check_harmless(text)
    assert "NaN" not in json.dumps(given(text, "told")) and given(text, "told")["charts"]


ODD = [None, [], {}, "x" * 5000, "a/" + "b" * 300, "\0/", float("inf"), True, -1, [[{}]], 10**30, "\ud800"]


def spoilt(value: Any, draw: random.Random) -> Any:
    """JSON of which one part in ten is something else."""
    if draw.random() < 0.1:
        return draw.choice(ODD)
    if isinstance(value, dict):
        return {key: spoilt(inner, draw) for key, inner in value.items()}
    return [spoilt(inner, draw) for inner in value] if isinstance(value, list) else value


def test_files_of_nonsense_make_pages_too(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    shutil.rmtree(folder / "images")
    whole = {path: path.read_text() for path in folder.rglob("*.json*")}
    for seed in range(8):
        draw = random.Random(seed)
        for path, text in whole.items():
            lines = [json.dumps(spoilt(json.loads(line), draw)) for line in text.splitlines()]
            path.write_text("".join(line + "\n" for line in lines))
        check_harmless(alone(Story(folder)))
        check_harmless(side_by_side([Story(folder), Story(run)]))


def test_whatever_is_missing_or_torn_is_said(run: Path, tmp_path: Path) -> None:
    """Every file gone, empty, cut in half, and full of rubbish, in turn."""
    files = [
        path.relative_to(run) for path in run.rglob("*") if path.is_file() and "step-0000" not in str(path)
    ]
    files += [Path("images/step-000000/drawings.jsonl"), Path("images/step-000120/000-drawn-seed0.png")]
    folder, made = copied(run, tmp_path), {}
    story = None
    for file in files:
        path, whole = folder / file, (run / file).read_bytes()
        for left in (None, b"", whole[: len(whole) // 2], b"\xff\x00{[" * 99):
            path.unlink()
            if left is not None:
                path.write_bytes(left)
            story = Story(folder)
            story.album.made = made  # pictures of before need not be made small again
            text = alone(story)
            path.write_bytes(whole)
            assert "cats" in text or file.name == "resolved.json"
        check_harmless(text)
    assert story is not None
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    assert "metrics.jsonl cannot be read: Is a directory" in Tags(alone(story)).told
    shutil.rmtree(folder)
    folder.mkdir()
    told = Tags(alone(story)).told
    assert "no step yet" in told or "no step was told yet" in told
    assert "metrics.jsonl holds no step yet" in told and "there is no resolved.json" in told


@pytest.mark.parametrize("steps", [0, 1])
def test_of_no_step_and_one(tmp_path: Path, steps: int) -> None:
    run_files.jsonl(tmp_path / "metrics.jsonl", [*run_files.lines(1)][:steps])
    (tmp_path / "resolved.json").write_text(json.dumps(run_files.config(tmp_path)))
    text = page.write(tmp_path).read_text(encoding="utf-8")
    told = given(text, "told")
    assert bool(told and told["charts"]) == bool(steps)
    assert ("of 400 steps" in Tags(text).told) == bool(steps)


def test_a_full_disk_raises_nothing_and_leaves_the_old_page(run: Path, tmp_path: Path) -> None:
    folder, heard = copied(run, tmp_path), list[str]()
    path = page.write(folder, heard.append)
    before = path.read_bytes()
    assert not heard
    part = folder / f".report.html.{os.getpid()}.part"
    part.symlink_to("/dev/full")
    assert page.write(folder, heard.append) == path
    assert len(heard) == 1 and "No space left" in heard[0] and path.read_bytes() == before
    assert not part.is_symlink(), "the next one would fail too"
    assert page.write(folder, heard.append) and len(heard) == 1
    page.write(tmp_path / "gone", heard.append)
    assert len(heard) == 2 and "No such file" in heard[1]


def test_a_disk_that_has_room_again_gets_its_pages_again(run: Path, tmp_path: Path) -> None:
    folder, heard = copied(run, tmp_path), list[str]()
    again = Refresh(folder, 0.0, heard.append)
    (folder / f".report.html.{os.getpid()}.part").symlink_to("/dev/full")
    for _ in range(2):
        assert not (folder / "report.html").exists()
        again.soon()
        again.close()
    assert (folder / "report.html").exists() and len(heard) == 1 and "No space left" in heard[0]


def test_a_controlnet_is_shown_with_its_second_image(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    run_files.jsonl(folder / "validation.jsonl", [row | {"hint_loss": 1.0, "hint_gap": 0.25} for row in rows])
    told = folder / "images" / "step-000120" / "drawings.jsonl"
    rows = [json.loads(line) | {"condition": "/etc/passwd"} for line in told.read_text().splitlines()]
    run_files.jsonl(told, rows)
    (folder / "images" / "conditions").mkdir()
    shutil.copy(
        folder / "images" / "step-000000" / "000-drawn-seed0.png",
        folder / "images" / "conditions" / "001.png",
    )
    text = page.write(folder).read_text(encoding="utf-8")
    check_harmless(text)
    assert text.count("shown to it") == 1 and text.index("shown to it") > text.index(run_files.PROMPTS[1])
    [chart] = [c for c in given(text, "told")["charts"] if c["title"] == "What the second image is worth"]
    assert [line["name"] for line in chart["series"]] == ["live", "ema"] and set(chart["series"][0]["y"]) == {
        0.25
    }


def test_two_threads_may_write_it(run: Path, tmp_path: Path) -> None:
    folder, wrong = copied(run, tmp_path), list[str]()
    threads = [threading.Thread(target=page.write, args=(folder, wrong.append)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a page took more than a minute"
    assert not wrong and (folder / "report.html").read_text().endswith("</html>")


def test_hostile_texts_are_texts(run: Path, tmp_path: Path) -> None:
    folder = hostile_run(tmp_path)
    single = page.write(folder).read_text(encoding="utf-8")
    both = page.report([folder, run], tmp_path / "both.html").read_text(encoding="utf-8")
    for text in (single, both):
        check_harmless(text)
        assert "alert(2)</script>" in Tags(text).told.replace("< /script>", "</script>"), (
            "it is shown as it is"
        )
        assert "49" not in re.findall(r"<!-- (\S+)", Tags(text).told)
        broken = text.replace(
            "&lt;img src=x onerror=&#34;alert(1)&#34;&gt;", '<img src=x onerror="alert(1)">'
        )
        with pytest.raises(AssertionError):
            check_harmless(broken)
        ended = text.replace("\\u003c", "<").replace("\\u003e", ">")
        with pytest.raises(AssertionError):
            check_harmless(ended)


def test_runs_side_by_side_differ_in_what_was_changed(run: Path, tmp_path: Path) -> None:
    for name, change in (
        ("a", {}),
        ("b", {"optimizer__lr": 3e-4, "data__source": str(tmp_path / "x" / "photos")}),
    ):
        other = run_files.write(tmp_path, name, steps=20, **change)
        if name == "a":
            config = run_files.config(tmp_path, "a", steps=20, data__source=str(tmp_path / "y" / "photos"))
            (other / "resolved.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    out = page.report([tmp_path / "a", tmp_path / "b", tmp_path / "empty"])
    assert out == tmp_path / "compare.html"
    text = out.read_text(encoding="utf-8")
    check_harmless(text)
    table = text.split('id="differences"')[1].split('id="results"')[0]
    names = re.findall(r'<th class="name" scope="row"><bdi>(.*?)</bdi>', table)
    assert sorted(names) == ["data.source", "optimizer.lr"]
    assert f"{tmp_path}/x/photos" in table and f"{tmp_path}/y/photos" in table, "their last parts are alike"
    charts = {chart["title"]: chart for chart in given(text, "told")["charts"]}
    assert [line["name"] for line in charts["Training loss"]["series"]] == ["a", "b"]
    assert text.index('id="differences"') < text.index('id="results"') < text.index('id="curves"')


def test_a_silent_run_is_not_said_to_run(tmp_path: Path) -> None:
    rows = [row | {"time": time.time() - 8000 + row["step"]} for row in run_files.lines(50)]
    run_files.jsonl(tmp_path / "metrics.jsonl", rows)
    run_files.jsonl(tmp_path / "starts.jsonl", [{"time": time.time() - 8000, "step": 0}])
    (tmp_path / "resolved.json").write_text(json.dumps(run_files.config(tmp_path)))
    assert "silent for 2h12m: it may have been killed" in Tags(alone(Story(tmp_path))).told
    rows = [row | {"time": time.time() - 50 + row["step"]} for row in run_files.lines(50)]
    run_files.jsonl(tmp_path / "metrics.jsonl", rows)
    assert "running, 50 of 400 steps, 2m55s left" in Tags(alone(Story(tmp_path))).told


def test_a_run_that_is_started_again_stands_where_that_start_began(tmp_path: Path) -> None:
    """Its lines are hours old, its end told of steps that were undone, and a night's pause is no work."""
    now = time.time()
    rows = [row | {"time": now - 40000 + row["step"]} for row in run_files.lines(40)]
    run_files.jsonl(tmp_path / "metrics.jsonl", rows)
    run_files.jsonl(tmp_path / "starts.jsonl", [
        {"time": now - 80000, "step": 0}, {"time": now - 79900, "step": 20, "end": "stopped"},
        {"time": now - 40000, "step": 20}, {"time": now - 39950, "step": 50, "end": "failed"},
        {"time": now - 60, "step": 40},
    ])  # fmt: skip
    (tmp_path / "resolved.json").write_text(json.dumps(run_files.config(tmp_path)))
    told = Tags(alone(Story(tmp_path))).told
    assert "running, 40 of 400 steps" in told and "silent" not in told
    assert "2m20s of training" in told, "100 s, and 40 s up to the last line"


def test_captions_that_do_nothing_are_noticed(tmp_path: Path) -> None:
    for gap, words in ((0.02, None), (1e-5, "may be ignored"), (-0.02, "do not help yet")):
        rows = [row | {"gap": gap} for row in run_files.validation(40, 10)]
        run_files.jsonl(tmp_path / "validation.jsonl", rows)
        told = Tags(alone(Story(tmp_path))).told
        assert ("The held-out pictures" in told) == bool(words) and (words or "") in told


def test_settings_of_another_version_are_shown_as_they_are(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    resolved = json.loads((folder / "resolved.json").read_text())
    (folder / "resolved.json").write_text(json.dumps(resolved | {"sorcery": {"level": 9}}))
    told = Tags(alone(Story(folder))).told
    assert "sorcery.level 9" in told and "cannot tell which are unusual" in told


def test_usual_settings_are_not_said_to_be_unusual(tmp_path: Path) -> None:
    """Also the kinds of tables: data.kind = "auto", and that of a method."""
    for method, told in ({}, {}), ({"kind": "lora"}, {"method.kind": ("lora", "full")}):
        values = run_files.config(tmp_path, **({"method": method} if method else {}))
        (tmp_path / "resolved.json").write_text(json.dumps(values))
        record = Record(tmp_path)
        record.refresh()
        config, _ = content.parsed(record)
        rows = content.settings(record, config, "")["changed"]
        assert {name: rest for name, *rest in rows if name.endswith(".kind")} == {
            name: [*both] for name, both in told.items()
        }
        assert ["data.source", "photos", '""'] in [[*row] for row in rows]


def test_the_verb(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(run, tmp_path)
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert cli.main(["report", str(folder)]) == 0, "a page of ours is written anew"
    capsys.readouterr()
    other = tmp_path / "mine.html"
    other.write_text("my own page")
    (tmp_path / "nothing").mkdir()
    for asked, found in (
        ([str(folder), "--out", str(other)], "something else lies there"),
        ([str(folder), str(folder)], "a run is named twice"),
        ([str(tmp_path)], f"name one of the runs in it: {folder}"),
        ([str(tmp_path / "nothing")], "it holds none of metrics.jsonl"),
        ([str(tmp_path / "typo")], "there is no such folder"),
        ([str(folder), "--out", str(tmp_path / "no" / "a.html")], "it cannot be written"),
    ):
        assert cli.main(["report", *asked]) == 2, asked
        assert found in capsys.readouterr().err, asked
    assert other.read_text() == "my own page"
    assert (
        cli.main(["report", str(folder / "report.html"), str(run), "--out", str(tmp_path / "two.html")]) == 0
    )


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        page.report([tmp_path / "none"])
    assert Record(tmp_path / "none").metrics.count == 0
