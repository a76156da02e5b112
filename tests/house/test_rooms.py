"""The house rules that can be counted: arrows, sizes, forbidden words, docstrings."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sfumato"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may use the rooms of the lines above its own, and its own line.
ROOMS = (
    ("errors",),
    ("config",),
    ("device", "place", "tuning", "variables"),
    ("launch", "reference"),
    ("data",),
    ("models",),
    ("objective",),
    ("methods",),
    ("engine",),
    (
        *("changes", "check", "drawing", "export", "mishaps", "planner", "previews", "prior"),
        *("report", "run", "slurm", "stopping", "validation", "watch"),
    ),
    ("start",),
    ("cache",),
    ("replay", "train"),
    ("audit", "bench", "demo", "doctor"),
    ("sample",),
    ("grammar",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
FILE_LINES, FUNCTION_LINES, TRAIN_LINES = 300, 60, 120
# A file that is over its bound, with the reason.
LONGER: dict[str, int] = {}


def place(path: Path) -> str:
    """A file's path as people say it: data/order.py."""
    return path.relative_to(PACKAGE).as_posix()


def imports(source: str) -> Iterator[tuple[str, int]]:
    """Every module that a source imports, at any depth, with its line; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names)


def check_arrows(source: str, file: str) -> None:
    """Fail if the file imports from a room below its own."""
    room = file.removesuffix(".py").split("/")[0]
    assert room == "__init__" or room in LEVEL, f"{room} has no line in ROOMS"
    for module, line in imports(source):
        parts = module.split(".")
        if parts[0] != "sfumato" or len(parts) < 2 or parts[1] not in LEVEL:
            continue
        assert room != "__init__", f"{file}:{line} imports {module}"
        assert LEVEL[parts[1]] <= LEVEL[room], f"{file}:{line}: {room} may not use {module}"
        if room == "models" and parts[1] == "data":
            assert parts[2] == "batch", f"{file}:{line}: models knows of data only its batch"


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def check_sizes(source: str, file: str) -> None:
    """Fail for a file or a function that is too long."""
    lines = source.count("\n")
    assert lines <= LONGER.get(file, FILE_LINES), f"{file} has {lines} lines"
    for name, length in functions(source):
        bound = TRAIN_LINES if (file, name) == ("train.py", "train") else FUNCTION_LINES
        assert length <= bound, f"{name} of {file} has {length} lines"


def check_words(source: str, file: str) -> None:
    """Fail for modules and constructs that have no place here."""
    for module, line in imports(source):
        for forbidden in ("torch.cuda", "accelerate", "omegaconf", "hydra", "torchvision"):
            assert not f"{module}.".startswith(f"{forbidden}."), f"{file}:{line} imports {module}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "cuda"), f"{file}:{node.lineno} names torch.cuda"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{file}:{node.lineno} has a bare except"
        if isinstance(node, ast.ClassDef):
            ending = re.search(r"(Manager|Handler|Helper|Utils?)$", node.name)
            assert not ending, f"{file}:{node.lineno}: name {node.name} for the noun that it owns"
    name = Path(file).stem
    assert name not in ("utils", "util", "helpers", "common", "misc"), (
        f"{file}: name it for the noun that it owns"
    )
    machine = re.search(r"""["'](/work/|/root/|/home/|/tmp/\w)""", source)
    assert not machine, f"{file} names a path of some machine: {machine and machine[0]}"


def check_docstrings(source: str, file: str) -> None:
    """Fail for a module, or a public class or function at its top, without a docstring."""
    tree = ast.parse(source)
    assert ast.get_docstring(tree) or not source.strip(), f"{file} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            short = isinstance(node, ast.FunctionDef) and len(node.body) == 1
            assert ast.get_docstring(node) or short, f"{node.name} of {file} has no docstring"


CHECKS = (check_arrows, check_sizes, check_words, check_docstrings)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("path", FILES, ids=place)
def test_file(path: Path, check) -> None:  # type: ignore[no-untyped-def]
    check(path.read_text(encoding="utf-8"), place(path))


@pytest.mark.parametrize(
    ("check", "file", "source"),
    [
        (check_arrows, "data/order.py", "from sfumato.engine import ranks\n"),
        (check_arrows, "data/order.py", "def f():\n    import sfumato.train\n"),
        (check_arrows, "data/order.py", "from sfumato import models\n"),
        (check_arrows, "models/sd.py", "from sfumato.data.loader import Loader\n"),
        (check_arrows, "__init__.py", "from sfumato.config import Config\n"),
        (check_arrows, "newroom.py", ""),
        (check_arrows, "data/order.py", "from . import batch\n"),
        (check_sizes, "data/order.py", "x = 1\n" * 301),
        (check_sizes, "data/order.py", "def f():\n" + "    x = 1\n" * 60),
        (check_sizes, "train.py", "def train():\n" + "    x = 1\n" * 120),
        (check_words, "data/order.py", "import torch\ntorch.cuda.synchronize()\n"),
        (check_words, "data/order.py", "from torch import cuda\n"),
        (check_words, "data/order.py", "from accelerate import Accelerator\n"),
        (check_words, "data/order.py", "try:\n    x = 1\nexcept:\n    pass\n"),
        (check_words, "data/order.py", "class DataManager:\n    pass\n"),
        (check_words, "data/order.py", 'FOLDER = "/home/me/images"\n'),
        (check_words, "data/utils.py", ""),
        (check_docstrings, "data/order.py", "def f():\n    pass\n"),
        (check_docstrings, "data/order.py", '"""Doc."""\n\n\ndef f():\n    x = 1\n    return x\n'),
    ],
)
def test_checks_catch(check, file: str, source: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError):
        check(source, file)


@pytest.mark.parametrize(
    "line", ["import sfumato.config, sfumato.cli", "import sfumato.models.folder, sfumato.data"]
)
def test_no_torch_until_it_computes(line: str) -> None:
    code = f"{line}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_torch_check_catches() -> None:
    code = "import torch, sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 1
