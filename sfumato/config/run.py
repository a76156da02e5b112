"""A whole run."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from sfumato.config.data import Data
from sfumato.config.environment import texts
from sfumato.config.method import ControlNet, Full, LoRA, Model, TextualInversion
from sfumato.config.objective import Objective
from sfumato.config.section import Section, named
from sfumato.config.training import (
    BadNumbers,
    Checkpoint,
    Ema,
    Engine,
    Export,
    Log,
    Optimizer,
    Preview,
    Profile,
    Validation,
)
from sfumato.errors import UserError

Method = Full | LoRA | ControlNet | TextualInversion


class Config(Section):
    """One run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder is output/name."""
    output: Path = Path("runs")
    """Where run folders are made."""
    seed: int = Field(0, ge=0, lt=2**63)
    """With the data and this number every random draw of the run is fixed."""
    steps: int = Field(ge=1)
    """Applied optimizer steps, in all."""
    batch_size: int = Field(ge=1)
    """Samples per optimizer step over all ranks."""
    micro_batch_size: int = Field(1, ge=1)
    """Samples per forward pass on one rank; the rest is accumulated."""
    time_limit: float | None = Field(None, gt=0)
    """Minutes after which the run saves and ends with exit code 75; the same command goes on. Unset: none."""
    model: Model
    method: Annotated[Method, Field(discriminator="kind")] = Full()
    """What learns."""
    data: Data
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    engine: Engine = Engine()
    ema: Ema = Ema()
    bad_numbers: BadNumbers = BadNumbers()
    checkpoint: Checkpoint = Checkpoint()
    preview: Preview = Preview()
    validation: Validation | None = None
    """Unset: none; `true` or an empty table takes the usual one."""
    log: Log = Log()
    profile: Profile = Profile()
    export: Export = Export()
    environment: dict[str, str] = {}
    """Environment variables that every rank gets before torch starts, such as NCCL_DEBUG = "INFO"; they win
    over the shell's. docs/environment.md lists those that matter."""

    _environment = field_validator("environment", mode="before")(texts)
    _named = field_validator("method", mode="before")(named("full"))

    @field_validator("validation", mode="before")
    @classmethod
    def _usual(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @field_validator("engine", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto":
            raise ValueError(f'engine = "{value}" is neither "auto" nor a table of settings')
        return {"auto": True} if value == "auto" else value

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.output / self.name

    def peak_lr(self, parameter: str = "") -> float:
        """The learning rate of a parameter after warm-up, by its name."""
        own = self.optimizer.text_encoder_lr if parameter.startswith("text_encoder") else None
        lr = self.optimizer.lr if own is None else own
        return lr * (self.batch_size if self.optimizer.scale_lr else 1)

    @property
    def learns_text(self) -> bool:
        """Whether the run's text encoders are in the forward pass of what learns."""
        return self.method.kind == "textual_inversion" or getattr(self.method, "text_encoders", False)

    def accumulation(self, world: int) -> int:
        """Micro-batches per rank and optimizer step on `world` ranks; UserError if it is not whole."""
        share = self.micro_batch_size * world
        if self.batch_size % share:
            raise UserError(
                f"batch_size = {self.batch_size}, micro_batch_size = {self.micro_batch_size}, {world} ranks",
                f"one pass over all ranks takes {share} samples, which does not divide {self.batch_size}",
                f"set batch_size to a multiple of {share}, or take a smaller micro_batch_size",
            )
        return self.batch_size // share

    def on(self, world: int) -> "Config":
        """The config as it runs on so many ranks: with the ZeRO stage, where none is set."""
        engine = self.engine
        # On one rank there is nothing to cut up, and DeepSpeed's books cost time for each parameter. In half
        # precision stage 1 holds the fp32 weights that stage 0 has not.
        asked = "zero_stage" in engine.model_fields_set or engine.auto or engine.deepspeed
        moved = engine.offload_optimizer != "none" or engine.offload_parameters != "none"
        if world > 1 or engine.precision != "fp32" or asked or moved:
            return self
        return self.model_copy(update={"engine": engine.model_copy(update={"zero_stage": 0})})

    @model_validator(mode="after")
    def _whole(self) -> "Config":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size = {self.batch_size} is not a multiple of micro_batch_size = "
                f"{self.micro_batch_size}; choose a micro_batch_size that divides it"
            )
        if self.optimizer.text_encoder_lr is not None and not self.learns_text:
            raise ValueError("optimizer.text_encoder_lr is set, but no text encoder learns")
        if self.ema.snapshots and not (self.ema.enabled and self.ema.profiles):
            raise ValueError("ema.snapshots copies what ema.profiles keeps; set ema.enabled and ema.profiles")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} is more than steps = {self.steps}"
            )
        return self

    @model_validator(mode="after")
    def _method(self) -> "Config":
        kind = self.method.kind
        if self.method.kind == "lora" and self.method.dora and self.engine.zero_stage == 3:
            raise ValueError(
                "method.dora measures whole layers, which engine.zero_stage = 3 cuts up; take stage 2 or less"
            )
        if self.method.kind == "lora" and self.method.base_bits and self.engine.zero_stage == 3:
            raise ValueError(
                f"method.base_bits = {self.method.base_bits} packs whole layers, which engine.zero_stage = 3 "
                "cuts up; take stage 2 or less"
            )
        if kind != "full" and self.model.from_scratch:
            raise ValueError(f'method.kind = "{kind}" learns beside given weights; unset model.from_scratch')
        if kind == "controlnet" and not all(part.conditioning_column for part in self.data.layouts):
            raise ValueError('method.kind = "controlnet" needs second images: set data.conditioning_column')
        if self.learns_text and self.data.cache in ("captions", "both"):
            raise ValueError(
                f'data.cache = "{self.data.cache}" reads what the text encoders said before they learned; '
                'set data.cache = "images" or "none"'
            )
        return self

    @model_validator(mode="after")
    def _compiled(self) -> "Config":
        engine = self.engine
        bits = self.method.base_bits if self.method.kind == "lora" else None
        refused = (
            (
                engine.zero_stage == 3,
                "engine.zero_stage = 3 brings weights between the operations that it joins",
                "stage 2",
            ),
            (
                engine.gradient_checkpointing == "selective",
                'engine.gradient_checkpointing = "selective" does not see the operations that it joins',
                "false or true",
            ),
            (bits is not None, f"the kernels of method.base_bits = {bits} are not torch's", "it away"),
            (
                "compile" in engine.deepspeed,
                "engine.deepspeed has DeepSpeed's own key compile",
                "that key away",
            ),
        )
        for is_so, found, instead in refused:
            if engine.compile and is_so:
                raise ValueError(f"engine.compile = true: {found}; take {instead}, or leave compile off")
        return self

    @model_validator(mode="after")
    def _preview(self) -> "Config":
        prompts, conditions = len(self.preview.prompts), len(self.preview.conditions)
        if conditions and self.method.kind != "controlnet":
            raise ValueError('preview.conditions are for method.kind = "controlnet"')
        if self.method.kind == "controlnet" and prompts and conditions not in (1, prompts):
            raise ValueError(
                f"preview.prompts are {prompts}, preview.conditions {conditions}; "
                "give one image for all, or one for each"
            )
        return self

    @model_validator(mode="after")
    def _prior(self) -> "Config":
        data = self.data
        if data.prior is not None and self.batch_size % 2:
            raise ValueError(
                f"batch_size = {self.batch_size}, of which data.prior takes half; give an even number"
            )
        if data.prior is not None and self.method.kind == "textual_inversion":
            raise ValueError("data.prior teaches a new word nothing; unset it, or take another method.kind")
        if data.prior is not None and (data.buckets is not None or len(data.resolutions) > 1):
            raise ValueError(
                "data.prior draws squares of one size; unset data.buckets, and give one resolution"
            )
        return self
