"""Uploads by the real client of the hub to a small hub of ours: what arrives, and what is refused when."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load

from sfumato.check import check
from sfumato.config import parse
from sfumato.errors import UserError
from tests.engine import runs
from tests.engine.ranks import run_ranks
from tests.engine.toy_hub import TOKEN, Hub, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


def started(place: Path, hub: Hub | str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with such arguments and a home of its own, where no token lies."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    address = hub if isinstance(hub, str) else hub.address
    own = {"HF_ENDPOINT": address, "HF_HOME": str(place / "home"), "HF_HUB_DISABLE_XET": "1"}
    own |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=place, env=kept | own | env, capture_output=True, text=True, timeout=200
    )


def train_beside(values: dict[str, Any], address: str) -> str:
    """Train where the client knows another hub; what was printed."""
    constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = address, True
    os.environ["HF_TOKEN"] = TOKEN
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runs.train_here(values)
    return said.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Path:
    """A LoRA's run that uploads what it leaves, from a folder of its own."""
    folder = tmp_path_factory.mktemp("upload")
    runs.write_model("sd", folder / "sd")
    runs.write_pictures(folder / "pictures")
    values = runs.settings(folder, name="mine", steps=1, batch_size=2, data__prompt="a sks cat")
    values |= {"method": {"kind": "lora", "rank": 2}, "export": {"push_to_hub": "me/at-the-end"}}
    (folder / "run.json").write_text(json.dumps(values))
    said = run_ranks(train_beside, 1, values, hub.address, timeout=200)[0]
    assert f"uploaded to {hub.address}/me/at-the-end" in said
    return folder


def check_arrived(files: dict[str, bytes], folder: Path, name: str) -> None:
    """Fail unless the hub has what lies in the folder, and nothing of this machine."""
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert files.keys() == there.keys()
    for file, path in there.items():
        assert file in ("README.md", "sfumato.json") or files[file] == path.read_bytes(), file
        assert str(folder.parents[2]).encode() not in files[file], f"{file} tells a path of this machine"
    assert f'model = "{name}"'.encode() in files["README.md"]
    assert json.loads(files["sfumato.json"])["base"] == "sd"


def test_a_run_uploads_what_it_leaves(place: Path, hub: Hub) -> None:
    check_arrived(hub.repositories["me/at-the-end"], place / "runs" / "mine" / "export", "me/at-the-end")
    assert hub.private["me/at-the-end"] is False
    tensors = load(hub.repositories["me/at-the-end"]["kohya.safetensors"])
    assert any(name.endswith("lora_up.weight") for name in tensors)


def test_a_path_that_is_told_is_caught(place: Path, hub: Hub) -> None:
    files = dict(hub.repositories["me/at-the-end"])
    files["model_index.json"] = str(place).encode()
    export = place / "runs" / "mine" / "export"
    with pytest.raises(AssertionError):
        check_arrived(files, export, "me/at-the-end")
    with pytest.raises(AssertionError, match=r"sfumato\.json tells"):
        local = {path.name: path.read_bytes() for path in export.iterdir()}
        check_arrived(local | {"README.md": files["README.md"]}, export, "me/at-the-end")


def test_the_command_uploads_what_lies_there(place: Path, hub: Hub) -> None:
    """With what the user has written into the card meanwhile; as a private repository if asked."""
    export = place / "runs" / "mine" / "export"
    card = (export / "README.md").read_text()
    (export / "README.md").write_text(card + "\nTwo cats of mine.\n")
    told = "-m", "sfumato", "export", "runs/mine", "--push-to-hub", "me/again", "--private"
    done = started(place, hub, *told, HF_TOKEN=TOKEN)
    assert (done.returncode, done.stdout) == (0, f"runs/mine/export\n{hub.address}/me/again\n"), done.stderr
    check_arrived(hub.repositories["me/again"], export, "me/again")
    assert b"Two cats of mine." in hub.repositories["me/again"]["README.md"]
    assert hub.private["me/again"] is True


REFUSED = {
    "a name": ("mine", {"HF_TOKEN": TOKEN}, "takes no such name"),
    "another name": ("me/a--b", {"HF_TOKEN": TOKEN}, "takes no such name"),
    "no token": ("me/new", {}, "no token for the hub"),
    "offline": ("me/new", {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_refused_before_anything_is_asked(tmp_path: Path, hub: Hub, case: str) -> None:
    name, env, words = REFUSED[case]
    before = len(hub.asked)
    done = started(tmp_path, hub, "-m", "sfumato", "export", "nothing", "--push-to-hub", name, **env)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("asked:") and "\n   do: " in done.stderr
    assert len(hub.asked) == before and not [*tmp_path.glob("[!h]*")]


def test_what_the_hub_refuses(place: Path, hub: Hub) -> None:
    """Each is one message of `prepare`; a run that it happens to ends well."""
    program = """
import os, sys
from sfumato.errors import UserError
from sfumato.report import upload
for token, name in (("bad", "me/new"), ("hf_good", "me/refused"), ("hf_good", "me/public")):
    os.environ["HF_TOKEN"], private = token, name == "me/public"
    try:
        print("made", upload.prepare(name, private))
    except UserError as error:
        print(str(error).replace(chr(10), " "))
from pathlib import Path
upload.after_run(Path("runs/mine/export"), "me/refused", False, print)
"""
    done = started(place, hub, "-c", program)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "does not accept the token" in lines[0] and "hf auth login" in lines[0]
    assert "may not write there" in lines[1] and "write access to me" in lines[1]
    assert "it is a public one" in lines[2]
    assert lines[3] == "The run is whole, but its upload failed." and "may not write" in done.stdout
    assert "me/public" not in hub.repositories and "me/refused" not in hub.repositories


def test_a_hub_out_of_reach(place: Path) -> None:
    program = """
from pathlib import Path
from sfumato.report import upload
upload.after_run(Path("runs/mine/export"), "me/new", False, print)
"""
    done = started(place, "http://127.0.0.1:9", "-c", program, HF_TOKEN=TOKEN)
    assert done.returncode == 0 and "cannot be reached" in done.stdout, done.stderr


def test_a_run_that_could_not_upload_does_not_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(place / "none"))
    values = json.loads((place / "run.json").read_text()) | {"name": "another"}
    with pytest.raises(UserError, match="no token for the hub"):
        check(parse(values), 1, "cpu")
