"""Pages and files that must agree with the code: settings, presets, README, packaging."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from sfumato import config
from sfumato.grammar import parse
from sfumato.reference import page, sections
from tests.house.test_rooms import FILES, ROOT, place

PRESETS = sorted(config.PRESETS.glob("*.toml"))


def check_described(section: type[BaseModel], path: str = "") -> None:
    """Fail for a setting without a docstring; `kind` speaks for itself."""
    for name, field in section.model_fields.items():
        below = f"{path}.{name}".lstrip(".")
        tables = sections(field.annotation)
        assert field.description or tables or name == "kind", f"{below} has no docstring"
        for table in tables:
            check_described(table, below)


def test_every_setting_is_described() -> None:
    check_described(config.Config)


def test_a_setting_without_docstring_is_caught() -> None:
    class Broken(config.Section):
        silent: int = 0

    with pytest.raises(AssertionError, match="silent"):
        check_described(Broken)


def test_the_page_of_settings_is_current() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m sfumato.reference > docs/config.md"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_parses_and_says_what_it_is(preset: Path) -> None:
    if "sample" in tomllib.loads(preset.read_text(encoding="utf-8")):
        assert parse(["sample", preset.stem]).model != preset.stem
    else:
        assert config.load(preset.stem).name == preset.stem
    first = preset.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# .{20,100}\.", first), f"{preset.name}: the first line is no sentence: {first}"


def check_map(readme: str, files: list[str]) -> None:
    """Fail unless the README names every file of the package, as `name.py`."""
    missing = [file for file in files if not re.search(rf"(?<![\w]){re.escape(Path(file).name)}", readme)]
    assert not missing, f"README's map lacks {', '.join(missing)}"


def mapped() -> list[str]:
    """The files that a map names; an __init__.py only where it does something."""
    return [place(path) for path in FILES if path.name != "__init__.py" or path.read_text().count("\n") > 20]


def test_the_readme_maps_every_file() -> None:
    check_map((ROOT / "README.md").read_text(encoding="utf-8"), mapped())


def test_a_file_missing_in_the_map_is_caught() -> None:
    with pytest.raises(AssertionError, match="hidden"):
        check_map("config.py cli.py", ["config.py", "data/hidden.py"])


def test_the_constraints_meet_the_project() -> None:
    """Every dependency has a tested version, at or above its floor."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    versions = {normal(name): version for name, version in tested.items()}
    for wanted in [*project["dependencies"], *extras["demo"], *extras["dev"]]:
        name, floor = wanted.split(">=") if ">=" in wanted else (wanted, "0")
        assert normal(name) in versions, f"{name} has no line in constraints.txt"
        assert numbers(versions[normal(name)]) >= numbers(floor), f"{name}: tested below its floor {floor}"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]


def test_the_package_carries_its_data() -> None:
    """A file that is not Python is installed only if pyproject.toml says so."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    data = project["tool"]["setuptools"]["package-data"]
    carried = {
        path
        for package, globs in data.items()
        for glob in globs
        for path in (ROOT / package.replace(".", "/")).glob(glob)
    }
    package = ROOT / "sfumato"
    others = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")
    }
    assert others <= carried, f"not in package-data: {sorted(map(str, others - carried))}"
