"""What a measurement was made on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from PIL import features

import sfumato

PACKAGES = ("torch", "numpy", "pillow", "datasets", "pyarrow", "safetensors")


def machine() -> dict[str, Any]:
    """cpu (its name), cores (that this process may use), memory (bytes), load (of the last minute), system,
    python, and versions {package: version}."""
    versions = {"sfumato": sfumato.__version__, "libjpeg": jpeg()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def jpeg() -> str:
    """Which library Pillow decodes JPEG with."""
    turbo = features.version_feature("libjpeg_turbo") if features.check_feature("libjpeg_turbo") else None
    return f"turbo {turbo}" if turbo else str(features.version_codec("jpg"))
