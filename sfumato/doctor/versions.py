"""Which versions compute here, beside those of the tests, and whether DeepSpeed's is known to err."""

import importlib.metadata
import platform
from pathlib import Path

from sfumato.config import Config
from sfumato.doctor.lines import Line, bad, good, judged, unseen, warning
from sfumato.engine import cells, offload
from sfumato.engine.cells import numbers
from sfumato.engine.ds_keys import check_nested_keys
from sfumato.errors import UserError

PYTHONS = ((3, 11), (3, 14))
"""From, and below."""
TESTED = {
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "numpy": "2.4.6",
    "safetensors": "0.8.0",
    "pydantic": "2.14.3",
}
"""What computes, in the versions of constraints.txt, which is not installed with us; a test compares them."""
OPTIONAL = ("peft",)
FLOORS = {"torch": "2.6", "deepspeed": cells.FLOOR, "diffusers": "0.36", "transformers": "4.56"}


def installed(package: str) -> str | None:
    """A package's version, None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def found() -> dict[str, str]:
    """Everything that computes, with its version: Python, packages, driver and CANN."""
    versions = {package: version for package in TESTED if (version := installed(package))}
    for package in ("torch_npu", "torch-npu", "intel_extension_for_pytorch", "bitsandbytes"):
        if version := installed(package):
            versions[package] = version
    files = {
        "nvidia driver": Path("/sys/module/nvidia/version"),
        "amdgpu driver": Path("/sys/module/amdgpu/version"),
        "ascend driver": Path("/usr/local/Ascend/driver/version.info"),
        "CANN": Path("/usr/local/Ascend/ascend-toolkit/latest/version.cfg"),
    }
    for name, file in files.items():
        try:
            versions[name] = file.read_text(encoding="utf-8").strip().splitlines()[0]
        except (OSError, IndexError, UnicodeDecodeError):
            continue
    return {"python": platform.python_version(), **versions}


def lines(versions: dict[str, str]) -> list[Line]:
    """What is said of them."""
    name = "versions"
    lacking = [package for package in TESTED if package not in versions and package not in OPTIONAL]
    if lacking:
        return [bad(name, f"{', '.join(lacking)} not installed", "install Sfumato's requirements")]
    told = ", ".join(f"{package} {version}" for package, version in versions.items())
    old = [
        f"{package} {versions[package]} (from {floor})"
        for package, floor in FLOORS.items()
        if numbers(versions[package]) < numbers(floor)
    ]
    if old:
        return [bad(name, f"too old: {', '.join(old)}; {told}", "install the versions of constraints.txt")]
    others = [
        f"{package} {versions[package]} for {tested}"
        for package, tested in TESTED.items()
        if package in versions and numbers(versions[package]) != numbers(tested)
    ]
    python = numbers(versions["python"])[:2]
    if not PYTHONS[0] <= python < PYTHONS[1]:
        others.append(f"python {versions['python']}, tested are 3.11 to 3.13")
    do = "see that the gradient line below is good; the tests ran with constraints.txt"
    if others:
        return [warning(name, f"not those of the tests: {', '.join(others)}", do, versions=versions)]
    return [good(name, f"as in the tests: {told}", versions=versions)]


def settings(config: Config | None, world: int, accelerator: str) -> list[Line]:
    """Whether the config goes with the number of ranks, and lies in no known-bad cell."""
    name = "settings"
    if config is None:
        return [unseen(name, "no config was named; Sfumato's defaults are tried below")]
    engine = config.engine
    try:
        steps = config.accumulation(world)
        offload.check(config, world)
        if engine.deepspeed:
            check_nested_keys(config, world)
        several = [*cells.found(config, world, accelerator)]
    except UserError as error:
        return [bad(name, f"{error.asked}: {error.found}", error.do)]
    if engine.precision == "fp16" and accelerator == "cpu":
        return [bad(name, "engine.precision = fp16, which CPUs have not", "set bf16 or fp32")]
    what = (
        f"{config.name}: {config.method.kind}, ZeRO stage {engine.zero_stage} in {engine.precision}, "
        f"{config.batch_size} = {config.micro_batch_size} x {world} ranks x {steps}"
    )
    if engine.auto:
        what += '; engine = "auto" is tried as it stands, not as the planner chooses'
    if not several:
        return [judged(True, name, f"{what}; in no known-bad cell of {len(cells.CELLS)}", "")]
    return [bad(name, f"{what}: {cell.what} ({cell.issue})", cell.do) for cell in several]
