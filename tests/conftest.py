"""For all tests: few threads, so that many processes fit on few cores; no GPU tests where there is none."""

import os

import pytest

# Before torch is imported, and for every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU on a machine without one."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))
