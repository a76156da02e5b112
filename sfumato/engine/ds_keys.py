"""The user's own DeepSpeed keys, looked at before anything is started."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.config import Config
from sfumato.engine.ds_config import OWNED, ds_config
from sfumato.errors import UserError

# DeepSpeed 0.19.8 reads these top-level keys; others it ignores without a word. A test compares the two.
DEEPSPEED_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel flops_profiler
    fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown
    optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type
    steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)

REFUSED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            "bf16.bf16_master_weights_and_grads",
            "bf16.bf16_optimizer_states",
            "fp16.fp16_master_weights_and_grads",
        ),
        (
            "a weight in half precision does not move by less than one part in some hundreds, as most steps "
            "of a fine-tune do, and no average of it can follow",
            'keep fp32 weights, and move them away with engine.offload_optimizer = "cpu"',
        ),
    ),
    **dict.fromkeys(
        (
            "zero_optimization.offload_optimizer.ratio",
            "zero_optimization.offload_optimizer.super_offload",
            "zero_optimization.zenflow",
        ),
        ("it steps with an optimizer of DeepSpeed's own, which keeps no averages", "remove it"),
    ),
    **dict.fromkeys(
        (
            "zero_optimization.offload_optimizer.pipeline_read",
            "zero_optimization.offload_optimizer.pipeline_write",
        ),
        ("what it reads ahead from a disk was compared with no run in memory", "remove it"),
    ),
}
"""DeepSpeed keys under which a run would not be what it says: dotted key -> why, and what to do."""


def deepspeed_faults(theirs: Mapping[str, Any]) -> list[UserError]:
    """Keys of [engine.deepspeed] that a setting of ours decides, or that DeepSpeed would ignore."""
    faults = []
    inside = [name for name, _ in dotted(theirs) if name in REFUSED]
    for key in theirs:
        if key not in DEEPSPEED_KEYS and key not in OWNED:
            near = difflib.get_close_matches(key, DEEPSPEED_KEYS - OWNED.keys(), 1)
            do = (
                f"did you mean {near[0]}?"
                if near
                else "remove it, or see DeepSpeed's configuration reference"
            )
            faults.append(UserError(f"[engine.deepspeed] {key}", "DeepSpeed does not know this key", do))
    for name, value in dotted(theirs):
        if name in REFUSED:
            faults.append(UserError(f"[engine.deepspeed] {name} = {value!r}", *REFUSED[name]))
        elif name in OWNED and not any(other.startswith(f"{name}.") for other in inside):
            ours = OWNED[name]
            faults.append(
                UserError(
                    f"[engine.deepspeed] {name} = {value!r}", f"{ours} decides that", f"set {ours} instead"
                )
            )
    return faults


def dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys of nested tables with their values, tables included."""
    for key, value in table.items():
        yield prefix + key, value
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")


def check_nested_keys(config: Config, world: int) -> None:
    """Let DeepSpeed's own models read the user's keys; what they refuse is a UserError."""
    # The import takes seconds, and few runs have such keys.
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    settings = ds_config(config, world)
    # DeepSpeed would compare it with the ranks of a group that does not exist yet.
    del settings["train_batch_size"]
    try:
        DeepSpeedConfig(settings)
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError, DeepSpeedConfigError) as error:
        raise UserError(
            f"[engine.deepspeed] with the keys {', '.join(config.engine.deepspeed)}",
            f"DeepSpeed refuses them: {error}",
            "mend them as DeepSpeed's configuration reference says",
        ) from None
