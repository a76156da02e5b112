"""`sfumato sample` from end to end, in one process: what is drawn, and what the files tell."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from sfumato.bench.drawing import SETTINGS
from sfumato.drawing import pictures, sources
from sfumato.drawing.depth import estimator
from sfumato.drawing.draw import draw
from sfumato.drawing.model import Ready
from sfumato.drawing.pictures import Album, write
from sfumato.drawing.pipelines import open_pipeline
from sfumato.drawing.request import Sampling, shots
from sfumato.errors import UserError
from sfumato.sample import Request, sample
from tests.unit import twins
from tests.unit.toy_drawing import write_control, write_depth_model, write_lora, write_mask, write_picture

QUICK = Sampling(steps=2, guidance=3.0, size=32)
LONG = "a red fox beside a house " * 13  # 78 tokens


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, control, two LoRAs, pictures, and a run of each kind around them."""
    root: Path = tmp_path_factory.mktemp("toys")
    twins.write("sd", root / "base")
    write_control(root / "control", root / "base")
    write_lora(root / "a.safetensors", root / "base", 1)
    write_lora(root / "b.safetensors", root / "base", 2)
    write_picture(root / "image.png", seed=1)
    write_picture(root / "condition.png", seed=2)
    write_mask(root / "mask.png")
    return root


def write_run(
    folder: Path, base: Path, kind: str, fill: Callable[[Path, int], object], steps: list[int]
) -> Path:
    """A run's folder as training leaves it: an export in each checkpoint, the last one's also in the run."""
    folder.mkdir()
    (folder / "resolved.json").write_text(json.dumps({"model": {"weights": str(base), "prompt_window": 77}}))
    for step in steps:
        fill(place := folder / f"checkpoints/step-{step:06d}/export", step)
        facts = {
            "step": step,
            "kind": kind,
            "run": folder.name,
            "base": str(base),
            "family": "sd",
            "window": 77,
        }
        (place / "sfumato.json").write_text(json.dumps(facts))
        if step == max(steps):
            shutil.copytree(place, folder / "export")
    return folder


def asked(root: Path, *prompts: str, **changes: Any) -> Request:
    given: dict[str, Any] = {
        "model": str(root / "base"),
        "prompts": prompts or ("a red fox",),
        "sampling": QUICK,
    }
    return Request(**(given | changes))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_a_folder_and_a_run(toys: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "resolved.json").write_text(json.dumps({"model": {"prompt_window": 150}}))
    with pytest.raises(UserError, match="holds an export"):
        sample(asked(toys, model=str(run), out=tmp_path / "out"))
    for step in (
        "step-000300",
        "step-001000",
    ):  # a run that was stopped is drawn with by its newest checkpoint
        (run / "checkpoints" / step).mkdir(parents=True)
        (run / "checkpoints" / step / "export").symlink_to(toys / "base")
    assert sources.find_model(run).folder == run / "checkpoints" / "step-001000" / "export"
    (run / "export").symlink_to(toys / "base")
    found = sources.find_model(run)
    assert (found.folder, found.prompt_window, found.kind) == (run / "export", 150, "full")
    how = replace(QUICK, guidance=50)
    request = asked(toys, LONG + "and a storm", seeds=(1, 2), sampling=how, out=tmp_path / "a")
    of_folder = sample(request)
    of_run = sample(replace(request, model=str(run), out=tmp_path / "b"))
    assert [path.name for path in of_folder] == [path.name for path in of_run]
    assert not np.array_equal(pixels(of_folder[0]), pixels(of_run[0])), "the run's window was not used"
    asked_window = sample(replace(request, window=150, seeds=(1,), out=tmp_path / "c"))
    assert np.array_equal(pixels(asked_window[0]), pixels(of_run[0])), "--window was not used"


def check_kept(sample: Callable[[Request], list[Path]], toys: Path, out: Path) -> None:
    """A second call into the same folder adds to what is there and changes nothing of it."""
    first = sample(asked(toys, seeds=(1, 2), out=out))
    before = {path: path.read_bytes() for path in out.iterdir()}
    second = sample(asked(toys, sampling=replace(QUICK, guidance=1.0), seeds=(1, 2), out=out))
    assert not set(first) & set(second), "the same names"
    for path, content in before.items():
        if path.name == "drawings.jsonl":
            assert path.read_bytes().startswith(content), "the list was written anew"
        else:
            assert path.read_bytes() == content, f"{path.name} was replaced"


def test_nothing_is_replaced(toys: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_kept(sample, toys, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "000-a-red-fox-seed1.png", "001-a-red-fox-seed2.png",
        "002-a-red-fox-seed1.png", "003-a-red-fox-seed2.png",
        "drawings.jsonl", "grid-002.png", "grid.png",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (out / "drawings.jsonl").read_text().splitlines()]
    assert [(line["file"][:3], line["guidance"]) for line in lines] == [
        ("000", 3.0), ("001", 3.0), ("002", 1.0), ("003", 1.0),
    ]  # fmt: skip


def test_kept_catches_names_that_begin_anew(toys: Path, tmp_path: Path) -> None:
    def broken(request: Request) -> list[Path]:
        pipeline, _ = open_pipeline(toys / "base", "cpu", torch.float32)
        return write(draw(pipeline, shots(request.prompts, request.seeds), request.sampling), request.out)

    with pytest.raises(AssertionError, match="same names"):
        check_kept(broken, toys, tmp_path / "out")


def test_two_calls_at_once_keep_each_others_pictures(toys: Path, tmp_path: Path) -> None:
    pipeline, _ = open_pipeline(toys / "base", "cpu", torch.float32)
    drawing = draw(pipeline, shots(["a"], [1]), QUICK)[0]
    first, second = Album(tmp_path), Album(tmp_path)
    paths = [first.save(drawing), second.save(drawing)]
    assert [path.name for path in paths] == ["000-a-seed1.png", "000-a-seed1-2.png"]
    assert first.finish([drawing]) + second.finish([drawing]) == paths


def test_files_tell_how_they_were_made(toys: Path, tmp_path: Path) -> None:
    how = replace(QUICK, negative="rain", scheduler="euler", strength=0.6, control_scale=0.5)
    inputs = {role: toys / f"{role}.png" for role in ("image", "condition")}
    paths = sample(
        asked(
            toys,
            "a Red fox, ünïcode ☂",
            "/../..",
            sampling=how,
            out=tmp_path,
            loras=[(toys / "a.safetensors", 0.5)],
            control=str(toys / "control"),
            emphasis=True,
            **inputs,
        )  # fmt: skip
    )
    assert [path.name for path in paths] == ["000-a-red-fox-n-code-seed0.png", "001-drawing-seed0.png"]
    wanted = {
        "prompt": "a Red fox, ünïcode ☂", "negative": "rain", "seed": 0, "steps": 2, "guidance": 3.0,
        "scheduler": "EulerDiscreteScheduler", "model": str(toys / "base"), "dtype": "fp32", "window": 77,
        "emphasis": True, "loras": f"{toys / 'a.safetensors'}=0.5", "control": str(toys / "control"),
        "control_scale": 0.5, "image": str(inputs["image"]), "strength": 0.6,
        "condition": str(inputs["condition"]), "width": 32, "height": 32,
    }  # fmt: skip
    line = json.loads((tmp_path / "drawings.jsonl").read_text("utf-8").splitlines()[0])
    assert wanted.items() <= line.items()
    with Image.open(paths[0]) as image:
        told = image.text  # type: ignore[attr-defined]
    assert told == {name: str(value) for name, value in line.items() if name != "file"}


def test_a_list_with_pictures_and_seeds_of_its_own(toys: Path, tmp_path: Path) -> None:
    """Each line has its own pictures; what the line leaves out comes from the command line."""
    lines = [
        {"prompt": "a fox", "image": "image.png", "seeds": [3, 4]},
        {"prompt": "a fox", "image": "condition.png", "negative": "rain"},
    ]
    file = toys / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    request = asked(toys, out=tmp_path / "all", prompts=(), file=file, seeds=(9,), mask=toys / "mask.png")
    paths = sample(request)
    assert [path.name for path in paths] == [
        "000-a-fox-seed3.png",
        "001-a-fox-seed4.png",
        "002-a-fox-seed9.png",
    ]
    alone = sample(
        asked(
            toys,
            "a fox",
            seeds=(9,),
            image=toys / "condition.png",
            mask=toys / "mask.png",
            sampling=replace(QUICK, negative="rain"),
            out=tmp_path / "one",
        )  # fmt: skip
    )
    assert np.array_equal(pixels(paths[2]), pixels(alone[0]))
    # Left of the mask the picture is the image's, so the two lines differ there.
    assert not np.array_equal(pixels(paths[1])[:, :12], pixels(paths[2])[:, :12])
    with Image.open(tmp_path / "all" / "grid.png") as sheet:
        assert sheet.width > 2 * 128 and sheet.height > 2 * 128


def check_loras(toys: Path, out: Path, weights: tuple[float, float]) -> None:
    """Several LoRAs, each with its weight, are those of diffusers."""
    files = [toys / "a.safetensors", toys / "b.safetensors"]
    found = sample(asked(toys, loras=list(zip(files, weights, strict=True)), out=out))
    stock = DiffusionPipeline.from_pretrained(toys / "base", low_cpu_mem_usage=False)
    for name, file in zip("ab", files, strict=True):
        stock.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    stock.set_adapters(["a", "b"], [0.5, 2.0])
    stock.set_progress_bar_config(disable=True)
    wanted = stock(
        "a red fox", width=32, height=32, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    assert np.array_equal(pixels(found[0]), np.asarray(wanted)), "another picture than diffusers"


def test_loras_are_weighted(toys: Path, tmp_path: Path) -> None:
    check_loras(toys, tmp_path / "good", (0.5, 2.0))
    with pytest.raises(AssertionError, match="another picture"):
        check_loras(toys, tmp_path / "broken", (1.0, 1.0))


def test_a_run_of_each_kind(toys: Path, tmp_path: Path) -> None:
    """A run and each of its checkpoints bring what was learned to the base that it was learned on."""
    base = toys / "base"
    fills: dict[str, Callable[[Path, int], object]] = {
        "lora": lambda place, step: write_lora(place / sources.LORA, base, step),
        "controlnet": lambda place, step: write_control(place, base),
        "textual_inversion": lambda place, step: write_words(place, {"<toy>": vectors(step)}),
    }
    runs = {kind: write_run(tmp_path / kind, base, kind, fill, [2, 10]) for kind, fill in fills.items()}
    shown = {"controlnet": {"condition": toys / "condition.png"}}
    plain = pixels(sample(asked(toys, "a <toy>", out=tmp_path / "plain"))[0])
    for kind, run in runs.items():
        request = asked(toys, "a <toy>", model=str(run), **shown.get(kind, {}))
        last = pixels(sample(replace(request, out=tmp_path / f"{kind}-out"))[0])
        assert not np.array_equal(last, plain), f"{kind} was not used"
        for step in (2, 10):
            checkpoint = run / f"checkpoints/step-{step:06d}"
            one = sample(replace(request, model=str(checkpoint), out=tmp_path / f"{kind}-{step}"))
            assert np.array_equal(pixels(one[0]), last) == (step == 10 or kind == "controlnet"), (
                f"{kind}, {step}"
            )
    as_control = asked(toys, "a <toy>", control=str(runs["controlnet"]), **shown["controlnet"])
    assert np.array_equal(
        pixels(sample(replace(as_control, out=tmp_path / "c"))[0]),
        pixels(next((tmp_path / "controlnet-out").glob("0*"))),
    )
    stock = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, low_cpu_mem_usage=False)
    stock.load_textual_inversion(str(runs["textual_inversion"] / "export"))
    stock.set_progress_bar_config(disable=True)
    wanted = stock(
        "a <toy>", width=32, height=32, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    found = pixels(next((tmp_path / "textual_inversion-out").glob("0*")))
    assert np.array_equal(found, np.asarray(wanted)), "learned words are not those of diffusers"


def vectors(seed: int) -> torch.Tensor:
    return torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))


def write_words(place: Path, tensors: dict[str, torch.Tensor]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place / sources.EMBEDDINGS)


def test_learned_words_of_sdxl(tmp_path: Path) -> None:
    """One file for both encoders; where the family reads the prompts the word is as many tokens."""
    twins.write("sdxl", tmp_path / "base")
    words = {"clip_l": vectors(1), "clip_g": vectors(2)}
    run = write_run(
        tmp_path / "run",
        tmp_path / "base",
        "textual_inversion",
        lambda place, _: write_words(place, words),
        [1],
    )
    request = asked(tmp_path, "a <toy>", out=tmp_path / "out")
    with pytest.raises(UserError, match="which word it is"):
        sample(replace(request, model=str(run)))
    for file in run.rglob("sfumato.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"token": "<toy>"}))
    plain = pixels(sample(request)[0])
    learned = pixels(sample(replace(request, model=str(run)))[0])
    assert not np.array_equal(learned, plain)
    # All weights 1: the family reads the prompt, and gives what the pipeline gives.
    assert np.array_equal(pixels(sample(replace(request, model=str(run), emphasis=True))[0]), learned)


def test_a_comparison(toys: Path, tmp_path: Path) -> None:
    """Columns: the base, then the steps by number; rows: prompts and seeds."""
    run = write_run(
        tmp_path / "run", toys / "base", "lora",
        lambda place, step: write_lora(place / sources.LORA, toys / "base", step), [900, 1000, 20],
    )  # fmt: skip
    (run / "checkpoints/step-000030").mkdir()  # without an export
    request = asked(toys, "a", "b", seeds=(1, 2), compare=run, out=tmp_path / "out")
    paths = sample(request)
    assert paths[-1] == tmp_path / "out/grid.png" and len(paths) == 4 * 4 + 1
    assert [path.parent.name for path in paths[:-1:4]] == ["base", "step-20", "step-900", "step-1000"]
    alone = sample(asked(toys, "b", seeds=(2,), model=str(run), out=tmp_path / "alone"))
    assert np.array_equal(pixels(alone[0]), pixels(paths[15])), "the last column is not the last step"
    with Image.open(paths[-1]) as sheet:
        content = np.asarray(sheet)
    cells = [np.asarray(Image.open(paths[place]).resize((128, 128), 0)) for place in (3, 15)]
    places = [where(content, cell) for cell in cells]
    assert places[0][0] == places[1][0] and places[0][1] < places[1][1], (
        "the sheet's columns are out of order"
    )
    again = sample(replace(request, model=str(run), prompts=("a",), seeds=(1,)))
    assert again[-1] == tmp_path / "out/grid-2.png" and again[0].name == "004-a-seed1.png"
    assert np.array_equal(pixels(again[0]), pixels(paths[0])), "the run's own base was not drawn"


def where(sheet: np.ndarray, cell: np.ndarray) -> tuple[int, int]:
    """Row and column of the first pixel of a cell in a sheet."""
    corner = (sheet[: -cell.shape[0], : -cell.shape[1]] == cell[0, 0]).all(-1)
    for y, x in zip(*corner.nonzero(), strict=True):
        if np.array_equal(sheet[y : y + cell.shape[0], x : x + cell.shape[1]], cell):
            return int(y), int(x)
    raise AssertionError("a picture is not in the sheet")


def test_figures_of_speed(toys: Path, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    how = replace(QUICK, steps=4, strength=0.5)
    request = asked(toys, "a", "b", bench=file, warm_up=1, repeats=2, out=tmp_path / "out", sampling=how)
    request = replace(request, vae="tiled", emphasis=True)
    assert sample(replace(request, image=toys / "image.png")) == [file]
    found = json.loads(file.read_text())
    assert (found["pictures"], found["warm_up"], found["ranks"]) == (2, 1, 1)
    wanted = {"strength": 0.5, "guidance_rescale": 0.0, "vae": "tiled", "emphasis": True}
    assert wanted.items() <= found["settings"].items()
    rates, seconds = found["iterations_per_second"], found["seconds_per_picture"]
    assert len(rates["rounds"]) == len(seconds["rounds"]) == 2
    for rate, second in zip(rates["rounds"], seconds["rounds"], strict=True):
        # Two of the four steps are done; the loop is a part of the picture's time, and most of it here.
        assert 0 < 2 / rate < second, "the loop took longer than the picture"
    assert not (tmp_path / "out").exists(), "pictures were written"
    with pytest.raises(UserError, match="it is there already"):
        sample(request)


def test_figures_name_all_that_a_model_is_drawn_with() -> None:
    found, cpu = sources.Found(Path("m")), torch.device("cpu")
    how = Ready("m", found, 77, True, ((Path("a"), 1.0),), Path("c"), "fp32", cpu, True, "tiled", True)
    assert all(getattr(how, field.name) for field in fields(how)), "a setting is left as it is by itself"
    assert how.settings().keys() - {"dtype"} <= set(SETTINGS)
    assert {"emphasis", "loras", "control", "vae", "compile", "offload"} <= how.settings().keys()


def test_depth_is_estimated(toys: Path, tmp_path: Path) -> None:
    """The map that the model makes is the condition, stretched to all greys, of the picture's size."""
    folder = write_depth_model(tmp_path / "dpt")
    with Image.open(toys / "image.png") as image:
        depth = estimator(str(folder), "cpu")(image)
    assert (depth.mode, depth.size, depth.getextrema()) == ("L", (32, 32), (0, 255))
    depth.save(tmp_path / "depth.png")
    request = asked(
        toys, control=str(toys / "control"), image=toys / "image.png", depth="auto", depth_model=str(folder)
    )
    auto = sample(replace(request, out=tmp_path / "auto"))
    request = replace(request, depth_model=None)
    ready = sample(replace(request, depth=str(tmp_path / "depth.png"), out=tmp_path / "ready"))
    assert np.array_equal(pixels(auto[0]), pixels(ready[0]))
    other = sample(replace(request, depth=str(toys / "image.png"), out=tmp_path / "other"))
    assert not np.array_equal(pixels(auto[0]), pixels(other[0])), "the depth map is not used"
    with Image.open(auto[0]) as image:
        assert str(folder) in image.text["condition"]  # type: ignore[attr-defined]


def test_pictures_that_are_not_finite_are_told(toys: Path, tmp_path: Path) -> None:
    broken = StableDiffusionPipeline.from_pretrained(
        toys / "base", safety_checker=None, low_cpu_mem_usage=False
    )
    with torch.no_grad():
        broken.unet.conv_out.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="and 1 more(.|\n)*not finite"):
        sample(asked(toys, "a", "b", model=str(tmp_path / "broken"), out=tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("0*.png"))) == 2


def test_prompts_that_are_cut_off_are_told(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(asked(toys, LONG, out=tmp_path / "a"))
    assert "has 78 tokens, the first 75 are read" in capsys.readouterr().err
    sample(asked(toys, LONG, window=150, out=tmp_path / "b"))
    assert capsys.readouterr().err == ""


def test_labels_name_what_tells_rows_apart() -> None:
    image = Image.new("RGB", (8, 8))
    two = [replace(shot, image=Path(f"x/{shot.row}.png")) for shot in shots(["a", "a"], [1])]
    found = [pictures.Drawing(shot.row, shot, image, QUICK, "") for shot in two]
    assert pictures.labels(found) == ["a (0.png)", "a (1.png)"]
    assert pictures.labels(found[:1] * 2) == ["a", "a"]


def test_a_picture_whose_name_is_not_in_utf8(tmp_path: Path) -> None:
    shot = replace(shots(["a"], [1])[0], image=Path("caf\udce9.png"))
    write([pictures.Drawing(0, shot, Image.new("RGB", (8, 8)), QUICK, "")], tmp_path)
    assert json.loads((tmp_path / pictures.LIST).read_text("utf-8"))["image"] == "caf?.png"
