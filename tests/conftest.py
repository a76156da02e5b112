"""For all tests: few threads, so that many processes fit on few cores; no GPU tests where there is none."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest

# Before torch is imported, and for every process that a test starts.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"


LONGEST = (
    *("test_validation", "test_command", "test_storm", "test_hosts", "test_slurm_real", "test_demo_style"),
    *("test_text_encoders", "test_training", "test_controlnet", "test_dreambooth", "test_numbers"),
    *(
        "test_nvme",
        "test_auto",
        "test_textual_inversion",
        "test_offload",
        "test_presets",
        "test_lora",
        "test_data_runs",
        "test_bench_gates",
        "test_launch_others",
        "test_launch_nodes",
        "test_launch",
    ),
    *("test_metrics", "test_bench_data", "test_planner_trace", "test_replay", "test_checkpoint_export"),
    *("test_data_index_processes", "test_doctor", "test_watch"),
    *("test_planner", "test_ema", "test_bad_numbers", "test_same_again", "test_upload", "test_saving"),
    *(
        "test_sample_ranks",
        "test_full_disk",
        "test_planner_state",
        "test_models_families",
        "test_accelerator",
    ),
    *("test_drawing_command", "test_agreement", "test_data_workers", "test_report_browser"),
)
"""The files that take longest, in that order: begun first, no worker is alone with one at the end."""


def pytest_collection_finish() -> None:
    """Half a second for every look of the collector through all that is imported by now, but for this."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, and leave out what needs a GPU on a machine without one."""
    turn = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turn.get(item.path.stem, len(LONGEST)))
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(autouse=True)
def no_place_is_left() -> Iterator[None]:
    """A command that a test calls in this process makes it a rank; the next test finds it as it was."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
