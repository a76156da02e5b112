"""Our settings as DeepSpeed's configuration.

Every key whose value changes numbers is written, because DeepSpeed's defaults move between releases (a
missing gradient_clipping means 1.0 since 0.19.3) and unknown top-level keys pass in silence.
"""

from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.engine.profiles import kinds
from sfumato.engine.size import STATES
from sfumato.errors import UserError

OWNED: dict[str, str] = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "[optimizer]",
    "scheduler": "optimizer.schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision and engine.fp16",
    "torch_autocast": "engine.precision",
    "amp": "engine.precision",
    "data_types": "engine.precision",
    "communication_data_type": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.offload_optimizer.pin_memory": "engine.pin_memory",
    "zero_optimization.offload_optimizer.nvme_path": "engine.nvme_path",
    "zero_optimization.offload_optimizer.buffer_count": "engine.offload_optimizer",
    "zero_optimization.offload_param.device": "engine.offload_parameters",
    "zero_optimization.offload_param.pin_memory": "engine.pin_memory",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
    "zero_optimization.cpu_offload_params": "engine.offload_parameters",
    "zero_optimization.cpu_offload_use_pin_memory": "engine.pin_memory",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "optimizer.name",
    "activation_checkpointing": "engine.gradient_checkpointing",
    "checkpoint": "[checkpoint]",
    "dataloader_drop_last": "[data]",
    "steps_per_print": "log.every",
}
"""DeepSpeed keys that a setting of ours decides: dotted DeepSpeed key -> our setting's name."""
SUB_GROUP = 50_000_000
"""Numbers that are stepped at once where they are read from a disk. DeepSpeed keeps page-locked room for a
group's weights, gradients and every state: its own billion would take 20 GB of memory with AdamW."""
BUCKET = 50_000_000
"""Numbers of a gradient that are summed over the ranks at once, at stages 1 to 3. DeepSpeed makes room for
all of them, also for a small model: its own 500 million take 1 to 2 GB of a card."""
MOST_PIECES = 4
"""Pieces of such a bucket, by the rank that owns them, that `engine/gradients.py` sends one by one: each goes
through all ranks in turn, and the waits of many short ones would cost more than a sum on all ranks."""


def autocast(config: Config) -> bool:
    """Whether the weights stay fp32 and torch casts the arithmetic.

    DeepSpeed's stage 0 with bf16 weights has no fp32 masters that can be read, so that cell is fp32 weights
    with bf16 arithmetic; at stages 1 to 3 the weights are bf16 and the masters fp32.
    """
    return config.engine.precision == "bf16" and config.engine.zero_stage == 0


def ds_config(
    config: Config, world: int, learning: int | None = None, swap: Path | None = None
) -> dict[str, Any]:
    """The whole DeepSpeed configuration of a run on `world` ranks.

    learning: numbers that learn, where that is known; buckets are no larger. swap: the process's own folder
    in `engine.nvme_path`.
    """
    engine, steps = config.engine, config.accumulation(world)
    low = engine.precision != "fp32" and not autocast(config)
    # Sums over many micro-batches lose digits in half precision; with one there is nothing to sum.
    fp32_sums = low and steps > 1
    ours: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": steps,
        # At stage 0 DeepSpeed does not report the norm that it clips to: engine.py clips there.
        "gradient_clipping": config.optimizer.max_grad_norm if engine.zero_stage else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32" if fp32_sums and engine.zero_stage > 1 else None,
        "data_types": {"grad_accum_dtype": "fp32" if fp32_sums else None},
        "bf16": {"enabled": low and engine.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": engine.precision == "fp16", **engine.fp16.model_dump()},
        "torch_autocast": {"enabled": False},
        "zero_optimization": {
            "stage": engine.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "round_robin_gradients": False,
            "reduce_bucket_size": BUCKET if learning is None else min(BUCKET, learning),
            "stage3_prefetch_bucket_size": BUCKET,
            # DeepSpeed's own linear layer rounds once more in half precision than torch's.
            "memory_efficient_linear": False,
        }
        | offloaded(config, swap),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": config.profile.breakdown,
        # From the third step on it would wait for the device before and after every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "flops_profiler": flops_profiler(config),
        "steps_per_print": 2**62,
    }
    return merge(ours, engine.deepspeed)


def flops_profiler(config: Config) -> dict[str, Any]:
    """DeepSpeed's keys for the one step whose arithmetic it counts."""
    step = config.profile.flops
    file = config.folder / "profile" / "flops.txt"
    # It counts steps from zero, and warns of an enabled one that has no step.
    return {"enabled": step is not None, "profile_step": (step or 1) - 1, "output_file": str(file)}


def offloaded(config: Config, swap: Path | None = None) -> dict[str, Any]:
    """DeepSpeed's keys for what does not stay on the device; none if all of it does."""
    engine = config.engine
    wanted = {"offload_optimizer": engine.offload_optimizer, "offload_param": engine.offload_parameters}
    found: dict[str, Any] = {
        key: {"device": device, "pin_memory": engine.pin_memory}
        for key, device in wanted.items()
        if device != "none"
    }
    if engine.offload_optimizer == "nvme":
        # A group's weights and gradients, and each of its states.
        count = 2 + len(STATES[config.optimizer.name]) + len(kinds(config.ema))
        found["offload_optimizer"] |= {"nvme_path": str(swap or engine.nvme_path), "buffer_count": count}
        found["sub_group_size"] = SUB_GROUP
    return found


def merge(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Lay the user's DeepSpeed keys over ours; one that our settings own is a UserError."""
    merged = dict(ours)
    for key, value in theirs.items():
        name = f"{prefix}{key}"
        if name in OWNED:
            raise UserError(
                f"[engine.deepspeed] {name} = {value!r}",
                f"{OWNED[name]} decides that" + (f" (now {ours[key]!r})" if key in ours else ""),
                f"remove it there and set {OWNED[name]}",
            )
        both = isinstance(value, dict) and isinstance(ours.get(key), dict)
        merged[key] = merge(ours[key], value, f"{name}.") if both else value
    return merged
