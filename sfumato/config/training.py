"""How the weights move, on what, and what a run keeps and tells."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sfumato.config.section import Section

Checkpointing = Literal[False, True, "selective"]
"""Whether activations are computed again in the backward pass; "selective": those that are cheap."""
FASTEST = "fastest"
"""engine.attention: what is the fastest for each kind of layer, timed as a run starts (models/fastest.py)."""


class Optimizer(Section):
    """How the weights move. Everything here counts applied optimizer steps."""

    name: Literal["adamw", "sgd"] = "adamw"
    """"sgd" is without momentum: with weight_decay = 0 one step is the gradient times lr, for checks."""
    lr: float = Field(1e-5, ge=0)
    """Peak learning rate."""
    text_encoder_lr: float | None = Field(None, ge=0)
    """Peak learning rate of text encoders that learn; unset: lr."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's guard against division by zero."""
    weight_decay: float = Field(1e-2, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """The gradient's global norm is cut to this; 0 does not clip."""
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    """The learning rate after the warm-up, over the rest of `steps`."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise from lr / warmup_steps to lr."""
    cycles: int = Field(1, ge=1)
    """Restarts of "cosine_with_restarts"."""
    power: float = Field(1.0, gt=0)
    """Exponent of "polynomial"."""
    scale_lr: bool = False
    """Multiply lr by the global batch size."""


class Fp16(Section):
    """DeepSpeed's dynamic loss scale; used with precision = "fp16" only."""

    initial_scale_power: int = Field(16, ge=0)
    """The scale starts at 2 to this power."""
    loss_scale: float = Field(0.0, ge=0)
    """A fixed scale; 0 is dynamic."""
    loss_scale_window: int = Field(1000, ge=1)
    """Good steps after which the scale doubles."""
    hysteresis: int = Field(2, ge=1)
    """Overflows before the scale halves."""
    min_loss_scale: float = Field(1.0, gt=0)
    """The scale goes no lower."""


class Engine(Section):
    """How DeepSpeed holds and moves the numbers."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over the ranks: 1 optimizer states, 2 and gradients, 3 and weights. Unset: 1, but 0
    on one rank in fp32, as there is nothing to shard."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where fp32 weights, optimizer states and averages wait for the step, which the processor then makes;
    "cpu" needs zero_stage 1, 2 or 3, and "nvme", the disk of `nvme_path`, zero_stage = 3."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where the weights wait until their layer is computed; "cpu" needs zero_stage = 3."""
    nvme_path: Path | None = None
    """A folder on a fast local disk; each process of a run makes one of its own there, gone with its end."""
    pin_memory: bool = True
    """Offload to page-locked memory, which copies faster; false where the system allows too little of it."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the trained part; the optimizer always holds fp32 weights. fp16 needs a GPU; on a CPU
    without AMX or the like bf16 takes longer than fp32. On NVIDIA's cards torch computes convolutions in fp32
    with TF32, of 10 bits (docs/speed.md)."""
    gradient_checkpointing: Checkpointing = False
    """Recompute activations in the backward pass: less memory, about a quarter more arithmetic. "selective"
    keeps what products and convolutions answer and recomputes the rest: no more arithmetic, less is saved."""
    compile: bool = False
    """Let torch.compile join the operations inside the denoiser's repeated blocks, at the first step, which
    takes minutes. Numbers change by rounding. Below zero_stage = 3; docs/speed.md says what was proved."""
    auto: bool = False
    """Let `sfumato plan` choose at each start what is not set here of zero_stage, offload_optimizer,
    offload_parameters and gradient_checkpointing, and micro_batch_size. `engine = "auto"` says the same."""
    attention: str | dict[str, str] | None = None
    """A diffusers attention backend such as "native", "flash" or "_native_npu", or a table of them by kind of
    layer, such as "down_blocks.1.attn2". "fastest": what a start of the run finds by timing, which the run
    then keeps. Unset, and for layers that are not named: torch chooses."""
    fp16: Fp16 = Fp16()
    """Loss scaling."""
    timeout: float = Field(1800, gt=0)
    """Seconds that a rank waits for the others before the run ends with an error."""
    compare_every: int = Field(100, ge=0)
    """Applied steps between two checks that all ranks hold the same weights; 0: never."""
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's own keys, passed on as they are; one that contradicts a setting of ours is refused."""


class Ema(Section):
    """A moving average of the fp32 weights, kept in shards beside the optimizer's states."""

    enabled: bool = False
    """Keep the average; the export then holds it."""
    decay: float = Field(0.9999, ge=0, lt=1)
    """Share of the old average that stays at each applied step."""
    warmup: bool = True
    """Limit the decay at step s to (1 + s) / (10 + s), so that the average forgets the start."""
    profiles: tuple[Annotated[float, Field(gt=0, lt=0.28)], ...] = ()
    """In place of `decay`: widths of power-function averages relative to the steps so far, such as
    [0.05, 0.1]. Two let any other width be made afterwards (arXiv:2312.02696, section 3)."""
    snapshots: int | None = Field(None, ge=1)
    """Applied steps between two copies of the averages alone, which stay for that; unset: none."""


class Checkpoint(Section):
    """What a run keeps so that it can go on."""

    every: int = Field(500, ge=1)
    """Applied steps between two checkpoints; the last step always has one."""
    keep: int = Field(2, ge=1)
    """How many of the newest stay."""
    keep_every: int | None = Field(None, ge=1)
    """Those whose step is a multiple of this stay too; unset: the newest alone."""
    accept: tuple[str, ...] = ()
    """Settings that move the curve and may still differ from the checkpoint's, by name, such as
    ["optimizer.lr"]; "data" for other data, "frozen" for other numbers in what does not learn."""
    export: bool = True
    """Put into each what its users load, so that it can be drawn with."""


class BadNumbers(Section):
    """What is done about a loss or gradient that is not finite. It never reaches the weights."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """"stop": save and end. "skip": leave the batch out. "rollback": take the newest checkpoint's weights,
    and go on with the data after the batch."""
    limit: int = Field(10, ge=1)
    """Batches that a run may leave out before it stops all the same."""
    spike: float = Field(8.0, ge=0)
    """A loss is flagged that lies so many robust deviations above the last ones' median; 0: none is."""


class Preview(Section):
    """Pictures of fixed prompts and seeds, drawn while training."""

    prompts: tuple[str, ...] = ()
    """One picture each; none: no previews."""
    conditions: tuple[str, ...] = ()
    """For a ControlNet: the conditioning image of each prompt, or one for all."""
    every: int = Field(500, ge=1)
    """Applied steps between two sets of pictures."""
    seed: int = Field(0, ge=0)
    """Where every picture's noise starts, the same each time."""
    steps: int = Field(25, ge=1)
    """Denoising steps."""
    guidance: float = Field(5.0, ge=0)
    """Weight of classifier-free guidance; 1 and less is without."""


class Validation(Section):
    """The loss of records that are never trained on, at fixed noise levels and with fixed noise."""

    samples: int = Field(32, ge=1)
    """How many records; they are held out of the data, or are of `source`."""
    source: str | None = Field(None, min_length=1)
    """A place of their own, whose records are told apart as [data] says; unset: they are taken out of the
    data, and no step trains on them."""
    every: int = Field(500, ge=1)
    """Applied steps between two validations; there is one before the first step and after the last, too."""
    quantiles: int = Field(8, ge=1, le=1000)
    """Noise levels: the middles of so many equal parts of the schedule."""


class Log(Section):
    """What is said while training."""

    every: int = Field(1, ge=1)
    """Applied steps between two lines of metrics.jsonl; each line is a mean over that many."""
    samples: bool = False
    """Tell the samples of those steps in each line, by their numbers in the index."""
    weights_every: int = Field(100, ge=1)
    """Applied steps between two measurements of the weights themselves: their norm, and how far the average
    is from them."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Who is told the same as metrics.jsonl, and shown the previews; docs/metrics.md has each one's extra."""
    project: str = Field("sfumato", min_length=1)
    """What the trackers file the run under; TensorBoard has no projects."""
    offline: bool = False
    """Let no tracker use the network: W&B keeps what `wandb sync` sends later, MLflow a file in `output`."""
    window: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (100, 199)
    """First and last step of those whose speed the summary at the end gives."""
    report_seconds: float = Field(30.0, gt=0)
    """Seconds between two writings of report.html."""

    @model_validator(mode="after")
    def _window(self) -> "Log":
        if self.window[0] > self.window[1]:
            raise ValueError(f"log.window = {list(self.window)} ends before it begins")
        return self


class Profile(Section):
    """Where the time of a few steps goes; what is found lies in the run's folder, in `profile`."""

    start: int | None = Field(None, ge=0)
    """torch's profiler begins after so many applied steps of the run, on the first rank; unset: never."""
    steps: int = Field(3, ge=1)
    """Optimizer steps that it watches."""
    flops: int | None = Field(None, ge=1)
    """DeepSpeed's flops profiler counts this optimizer step of a start, on the first rank; unset: none."""
    breakdown: bool = False
    """Write DeepSpeed's wall-clock breakdown of every step, which waits for the device many times in each."""


class Export(Section):
    """The trained model as its users load it."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the exported weights."""
    push_to_hub: str | None = Field(None, pattern=r"^[^/\s]+/[^/\s]+$")
    """A repository of the Hugging Face hub, "owner/name", to which the export goes at the end of a run. It is
    made if it is not there; a run whose upload fails is none the worse."""
    private: bool = False
    """Make that repository a private one."""

    @model_validator(mode="after")
    def _uploaded(self) -> "Export":
        if self.private and self.push_to_hub is None:
            raise ValueError("export.private is for an upload; set export.push_to_hub")
        return self
