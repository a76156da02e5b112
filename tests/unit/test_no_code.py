"""Nothing that is loaded runs code: pickles and modules of Python planted where runs and drawings look."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato import config as settings
from sfumato import run
from sfumato.check import check
from sfumato.drawing import adapters, depth, pipelines, sources
from sfumato.engine import published, saved
from sfumato.errors import UserError
from sfumato.models.folder import examine
from tests.unit import test_run, toy_drawing, twins

CPU = torch.device("cpu")


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that code of the planted files would make."""
    return tmp_path / "mark"


def plain(mark: Path) -> bytes:
    return pickle.dumps({"weight": Bomb(mark)})


def zipped(mark: Path) -> bytes:
    """As torch.save writes it."""
    out = io.BytesIO()
    torch.save({"weight": Bomb(mark)}, out)
    return out.getvalue()


def old(mark: Path) -> bytes:
    """As the first pickles were: without a number of their version."""
    return pickle.dumps(Bomb(mark), protocol=0)


PICKLES = [plain, zipped, old]


@pytest.mark.parametrize("bomb", PICKLES)
def test_the_bombs_are_live(mark: Path, bomb: Callable[[Path], bytes]) -> None:
    if bomb is zipped:
        torch.load(io.BytesIO(bomb(mark)), weights_only=False)
    else:
        pickle.loads(bomb(mark))
    assert mark.exists()


def refused(mark: Path, name: str, act: Callable[[], Any]) -> str:
    """What a UserError says, which names the file; no planted code ran."""
    try:
        act()
    except UserError as error:
        assert not mark.exists(), "planted code ran"
        assert name in str(error), str(error)
        return str(error)
    raise AssertionError(f"{name} was taken")


PLANTED = [
    (test_run.RANK, plain),
    (test_run.RANK, zipped),
    ("rank-00002.safetensors", old),
    ("optimizer.pt", plain),
    ("state.pkl", old),
    ("notes.txt", plain),
    ("export/unet/diffusion_pytorch_model.bin", zipped),
    ("export/pipeline.py", lambda mark: f"open({str(mark)!r}, 'w')".encode()),
]


@pytest.mark.parametrize(("name", "bomb"), PLANTED, ids=lambda value: getattr(value, "__name__", value))
def test_a_checkpoint_with_code_is_refused_by_name(
    tmp_path: Path, mark: Path, name: str, bomb: Callable[[Path], bytes]
) -> None:
    asked = test_run.config(tmp_path)
    test_run.save(asked, 10)
    path = test_run.save(asked, 20)
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(bomb(mark))
    assert "which could run code" in refused(mark, name, lambda: saved.Saved(path))
    step, told = test_run.latest(asked)
    assert step == 10 and name in told[0] and "step-000020.damaged" in told[0] and not mark.exists()


def test_what_is_no_code_is_left_alone(tmp_path: Path) -> None:
    """A user's notes, and a header of safetensors whose length looks like a pickle's first bytes."""
    path = test_run.save(test_run.config(tmp_path), 10)
    (path / "notes.txt").write_text("the best one so far")
    length = 0x0280  # bytes 80 02, as of a pickle of protocol 2
    tensors = {"a" * n: torch.ones(1) for n in (1, length - 8 - 55)}
    for extra in range(64):
        saved.write(path / "more.safetensors", {**tensors, "b" * (300 + extra): torch.ones(1)})
        if (path / "more.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    assert [*published.code_in(path)] == []


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("way", ["in its place", "beside"])
def test_a_models_folder(tmp_path: Path, mark: Path, part: str, way: str) -> None:
    folder = twins.copy("sd", tmp_path)
    [file] = (folder / part).glob("*.safetensors")
    if way == "in its place":
        file.write_bytes(zipped(mark))
    else:
        file.rename(file.with_suffix(".away"))
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        (folder / part / name).write_bytes(zipped(mark))
    (tmp_path / "pictures").mkdir()
    toy_drawing.write_picture(tmp_path / "pictures" / "0.png", (64, 64))
    data = {"source": str(tmp_path / "pictures"), "resolution": 64, "store": str(tmp_path / "store")}
    values = {"steps": 1, "batch_size": 1, "output": str(tmp_path), "model": {"weights": str(folder)}}

    def train() -> None:
        check(settings.parse(values | {"data": data}), 1, "cpu")
        twins.load(folder)

    refused(mark, part, train)
    refused(mark, part, lambda: pipelines.open_pipeline(folder, CPU, torch.float32))


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt", "a.safetensors", sources.LORA])
def test_a_lora(tmp_path: Path, mark: Path, name: str) -> None:
    (tmp_path / name).write_bytes(zipped(mark))
    asked = tmp_path if name == sources.LORA else tmp_path / name
    refused(mark, name, lambda: adapters.check_lora(asked, twins.twin("sd")))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_a_controlnet(tmp_path: Path, mark: Path, name: str) -> None:
    folder = toy_drawing.write_control(tmp_path / "control", twins.twin("sd"))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / name).write_bytes(zipped(mark))

    def draw() -> None:
        adapters.check_control(sources.find_control(folder), twins.twin("sd"))

    refused(mark, name, draw)
    refused(mark, "control", lambda: adapters.load_control(folder, torch.float32, CPU))


def test_learned_words(tmp_path: Path, mark: Path) -> None:
    (tmp_path / sources.EMBEDDINGS).write_bytes(zipped(mark))
    refused(mark, sources.EMBEDDINGS, lambda: adapters.add_words(None, tmp_path, {}))


@pytest.mark.parametrize("way", ["pickle", "module", "processor"])
def test_a_depth_model(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    folder = toy_drawing.write_depth_model(tmp_path / "depth")
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    if way == "pickle":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(zipped(mark))
    elif way == "module":
        mapped = {"AutoConfig": "evil.Evil", "AutoModelForDepthEstimation": "evil.Evil"}
        change(folder / "config.json", {"auto_map": mapped, "model_type": "evil"})
    else:
        mapped = {"AutoImageProcessor": "evil.Evil"}
        change(folder / "preprocessor_config.json", {"auto_map": mapped, "image_processor_type": "Evil"})
    monkeypatch.setattr("builtins.input", lambda _: "y")  # a user who is asked, and does not read
    refused(mark, "depth", lambda: depth.estimator(str(folder), CPU))


def change(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("way", ["pipeline", "part"])
def test_a_pipeline_with_a_module_of_its_own(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    folder = twins.copy("sd", tmp_path)
    code = f"open({str(mark)!r}, 'w')\nclass Evil: pass\n"
    if way == "pipeline":
        (folder / "evil.py").write_text(code)
        change(folder / "model_index.json", {"_class_name": ["evil", "Evil"]})
    else:
        (folder / "scheduler" / "evil.py").write_text(code)
        change(folder / "model_index.json", {"scheduler": ["evil", "Evil"]})
    monkeypatch.setattr("builtins.input", lambda _: "y")
    refused(mark, "", lambda: pipelines.open_pipeline(folder, CPU, torch.float32))
    try:
        examine(settings.Model(weights=str(folder)))
    except UserError:
        pass
    assert not mark.exists(), "planted code ran"
    shutil.rmtree(folder)


def test_a_run_with_nothing_but_such_checkpoints_does_not_begin_anew(tmp_path: Path, mark: Path) -> None:
    asked = test_run.config(tmp_path)
    (test_run.save(asked, 10) / "extra.pkl").write_bytes(plain(mark))
    refused(mark, "step-000010.damaged", lambda: run.latest(asked, "data", test_run.ALONE, lambda _: None))
