"""Every setting that a user can say, typed and checked. Imports no torch (a test proves it).

A run is one `Config`, frozen. People write it as TOML; `load` reads the file, applies `key=value`
overrides, and reports every mistake of the file in one message. What depends on more than the file
(the number of ranks, the weights' folder, the data) is checked in `check.py`.
"""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sfumato.errors import UserError

PRESETS = Path(__file__).parent / "presets"


class Section(BaseModel):
    """A table of the config file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
    """Which model is trained, and from which weights."""

    weights: str = Field(min_length=1)
    """A diffusers folder, or a hub id such as "stabilityai/stable-diffusion-xl-base-1.0"."""
    family: str | None = None
    """"sd", "sdxl", or another file of sfumato/models; unset: read from the folder's model_index.json."""
    revision: str | None = None
    """The hub revision of `weights`."""
    variant: str | None = None
    """The file variant to read, such as "fp16" for diffusion_pytorch_model.fp16.safetensors."""
    vae: str | None = None
    """Another VAE (folder or hub id) in place of the one in `weights`."""
    vae_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the frozen VAE; "auto" is bf16 under bf16 training and fp32 otherwise, never fp16."""
    from_scratch: bool = False
    """Start the trained part from random numbers, built from the folder's config files."""
    prompt_window: Literal[77, 150, 225] = 77
    """Tokens of a prompt that are read: 77, or two or three windows of 75 encoded one by one and joined."""


def named(value: Any) -> Any:
    """Let a kind stand for its table: `weight = "min_snr"` is `weight = { kind = "min_snr" }`."""
    return {"kind": value} if isinstance(value, str) else value


class Full(Section):
    """Every weight of the denoiser learns."""

    kind: Literal["full"] = "full"


class LoRA(Section):
    """Small matrices beside the denoiser's layers learn; the layers stay (arXiv:2106.09685). Needs peft."""

    kind: Literal["lora"]
    rank: int = Field(16, ge=1)
    """Columns of the small matrices."""
    alpha: float | None = Field(None, gt=0)
    """Their product counts alpha / rank times; unset: once."""
    targets: tuple[str, ...] = ()
    """The layers: ends of their names such as "to_q", or patterns such as "re:.*attn2.*to_[kv]"; unset:
    those of the family."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a small matrix's inputs that is left out while training."""
    dora: bool = False
    """Learn the length of each layer's columns besides (arXiv:2402.09353)."""
    rslora: bool = False
    """Count the product alpha / sqrt(rank) times (arXiv:2312.03732)."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How the first small matrix is drawn; the second starts at 0, so that nothing is changed at step 0."""


class Layout(Section):
    """Where records lie, and how they are told apart."""

    source: str = ""
    """A folder of images, a folder of parquet files, a folder saved by `datasets`, tar shards such as
    "s3://bucket/{00000..00099}.tar", a list such as "fill50k/train.jsonl", or the hub id of a data set."""
    kind: Literal["auto", "folder", "list", "tar", "parquet", "datasets", "hub"] = "auto"
    """What `source` is; "auto" looks."""
    image_column: str = "image"
    """The column or key that holds the image; in tar shards, the ending of its name."""
    caption_column: str = "text"
    """The column or key that holds the caption or the list of captions."""
    caption_weight_column: str | None = None
    """The column or key that holds one weight for each caption; unset: all count alike."""
    conditioning_column: str | None = None
    """The column or key that holds a second image, which conditions the first; in a folder of pictures, the
    folder that it lies in, under the same name. Unset: none is read."""
    caption_file: Literal["auto", "txt", "json"] = "auto"
    """The file beside an image that holds its captions: each line of NAME.txt, or `caption_column` in
    NAME.json; "auto" takes the first of them that is there, of captions with weights the .json."""
    prompt: str | None = None
    """The caption of images that have none, such as DreamBooth's; unset: they are faults."""
    folder_repeats: bool = False
    """Read the folder "10_dog" ten times an epoch, with "dog" as the caption of images without one."""


class Part(Section):
    """One of several sources. What is not set is as [data] says."""

    source: str = Field(min_length=1)
    """As data.source."""
    repeats: float | None = Field(None, gt=0)
    """Visits of each of its records in an epoch; unset: 1."""
    weight: float | None = Field(None, gt=0)
    """Its share of all visits, relative to the other parts' weights; all parts have it, or none."""
    kind: Literal["auto", "folder", "list", "tar", "parquet", "datasets", "hub"] | None = None
    """As data.kind."""
    image_column: str | None = None
    """As data.image_column."""
    caption_column: str | None = None
    """As data.caption_column."""
    caption_weight_column: str | None = None
    """As data.caption_weight_column."""
    conditioning_column: str | None = None
    """As data.conditioning_column."""
    caption_file: Literal["auto", "txt", "json"] | None = None
    """As data.caption_file."""
    prompt: str | None = None
    """As data.prompt."""
    folder_repeats: bool | None = None
    """As data.folder_repeats."""


class Buckets(Section):
    """Sizes of several aspects; a step's samples are all of one of them."""

    min: int | None = Field(None, ge=8)
    """Shortest side, in pixels; unset: half the resolution."""
    max: int | None = Field(None, ge=8)
    """Longest side, in pixels; unset: twice the resolution."""
    step: int = Field(64, ge=8)
    """Sides are multiples of this."""
    area: int | None = Field(None, ge=64)
    """Most pixels; unset: the square of the resolution."""
    upscale: bool = True
    """Enlarge smaller pictures; otherwise each is cut down to multiples of `step`."""
    sizes: tuple[tuple[int, int], ...] = ()
    """These sizes (width, height) in place of computed ones."""
    smallest: int = Field(1, ge=1)
    """A bucket of fewer records is given up, and they go to the next one in shape."""


class Tags(Section):
    """Captions that are lists, such as "1girl, smile, hat"."""

    shuffle: bool = False
    """Draw their order anew at each visit."""
    keep: int = Field(0, ge=0)
    """So many at the front stay where they are."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the others that is left out at each visit."""
    separator: str = Field(",", min_length=1)
    """What stands between two."""


class Data(Layout):
    """Where the images and captions come from, and what becomes of them."""

    parts: tuple[Part, ...] = ()
    """Several sources in place of one, each a [[data.parts]]."""
    resolution: int | tuple[int, ...] = 512
    """Side of the square that is trained on, in pixels, or of the square of a bucket's area. A list: each
    picture is seen at each of them."""
    buckets: Buckets | None = None
    """Sizes of several aspects in place of one square; `true` or an empty table takes the usual ones."""
    center_crop: bool = False
    """Cut the middle of the picture; otherwise the place is drawn anew at each visit."""
    flip: bool = False
    """Mirror half of the visits."""
    caption_dropout: float = Field(0.0, ge=0, le=1)
    """Share of visits that train the unconditional model, drawn per sample."""
    caption_prefix: str = ""
    """Put before every caption that is not dropped."""
    caption_suffix: str = ""
    """Put behind every caption that is not dropped."""
    tags: Tags = Tags()
    """What is done with captions that are lists."""
    views: int | None = Field(None, ge=1)
    """Draw so many crops, flips and captions of a record, and take them in turn; unset: new ones at each
    visit. A cache of what is drawn needs it."""
    posterior: Literal["sample", "mean"] = "sample"
    """What the VAE's Gaussian gives: a new sample at each visit, or its mean."""
    cache: Literal["none", "images", "captions", "both"] = "none"
    """What is encoded before training and read from disk: the VAE's part, the text encoders', or both."""
    store: Path = Path("cache")
    """The folder of what is made from data: indexes and caches. Runs share it."""
    max_faults: float = Field(0.01, ge=0, le=1)
    """Share of records that may be unusable before a run is refused. They are listed, and others take
    their place."""
    max_pixels: int = Field(178_956_970, ge=64)
    """A picture of more pixels is a fault: a small file can be made that decodes to gigabytes."""
    workers: int = Field(2, ge=0)
    """Loader processes per rank; 0 loads in the training process."""
    worker_timeout: float = Field(300, gt=0)
    """Seconds that a step waits for its data before the run ends with an error; needs workers."""

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The resolutions as a list."""
        return (self.resolution,) if isinstance(self.resolution, int) else self.resolution

    @property
    def layouts(self) -> list[Layout]:
        """One layout for each part, complete."""
        own = {name: getattr(self, name) for name in Layout.model_fields}
        if not self.parts:
            return [Layout(**own)]
        told = [part.model_dump(exclude={"repeats", "weight"}, exclude_none=True) for part in self.parts]
        return [Layout(**own | values) for values in told]

    @field_validator("buckets", mode="before")
    @classmethod
    def _usual(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        if bool(self.source) == bool(self.parts):
            raise ValueError("set data.source, or [[data.parts]] that each have one, and not both")
        if len({part.weight is None for part in self.parts}) > 1:
            raise ValueError("give every [[data.parts]] a weight, or none")
        if any(part.weight is not None and part.repeats is not None for part in self.parts):
            raise ValueError("a part has repeats or a weight, not both")
        if not self.resolutions or min(self.resolutions) < 8:
            raise ValueError(f"data.resolution = {self.resolution}: give 8 pixels or more")
        if self.buckets is not None and len(self.resolutions) > 1:
            if self.buckets.area is not None or self.buckets.sizes:
                raise ValueError("data.buckets.area and sizes go with one data.resolution")
        return self


class UniformTimesteps(Section):
    """Every timestep is as likely as any other."""

    kind: Literal["uniform"] = "uniform"


class BiasedTimesteps(Section):
    """A part of the timesteps is drawn `multiplier` times as often (diffusers' timestep bias)."""

    kind: Literal["earlier", "later", "range"]
    multiplier: float = Field(1.0, gt=0)
    """How many times as likely the chosen part is."""
    portion: float = Field(0.25, gt=0, le=1)
    """Share of the timesteps, from the low-noise ("earlier") or high-noise ("later") end."""
    begin: int = Field(0, ge=0)
    """First timestep of "range"."""
    end: int = Field(1000, ge=1)
    """One past the last timestep of "range"."""


class UniformWeight(Section):
    """Every timestep's loss counts the same."""

    kind: Literal["uniform"] = "uniform"


class MinSNRWeight(Section):
    """min(SNR, gamma), divided as the prediction target asks (arXiv:2303.09556)."""

    kind: Literal["min_snr"]
    gamma: float = Field(5.0, gt=0)
    """The SNR above which a timestep counts less."""


class Objective(Section):
    """What the network is asked to predict, at which noise levels, and how much each counts."""

    prediction: Literal["auto", "epsilon", "v", "sample"] = "auto"
    """The target; "auto" is what the weights' own scheduler says."""
    timesteps: Annotated[UniformTimesteps | BiasedTimesteps, Field(discriminator="kind")] = UniformTimesteps()
    """The law that timesteps are drawn from."""
    weight: Annotated[UniformWeight | MinSNRWeight, Field(discriminator="kind")] = UniformWeight()
    """How much each timestep's loss counts."""
    noise_offset: float = Field(0.0, ge=0)
    """Adds this much noise that is constant over each latent channel."""
    input_perturbation: float = Field(0.0, ge=0)
    """Adds this much extra noise to the input but not to the target (arXiv:2301.11706)."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that its last step holds no signal (arXiv:2305.08891)."""

    _named = field_validator("timesteps", "weight", mode="before")(named)

    @model_validator(mode="after")
    def _terminal(self) -> "Objective":
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                'zero_terminal_snr with prediction = "epsilon" has nothing to learn at the last step, '
                'where the input is the noise itself; use prediction = "v" or "sample"'
            )
        return self


class Optimizer(Section):
    """How the weights move. Everything here counts applied optimizer steps."""

    name: Literal["adamw", "sgd"] = "adamw"
    """"sgd" is without momentum: one step is the gradient times lr, which is what checks want."""
    lr: float = Field(1e-5, ge=0)
    """Peak learning rate."""
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
    """What is sharded over the ranks: 1 optimizer states, 2 and gradients, 3 and weights."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the trained part; the optimizer always holds fp32 weights. fp16 needs a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a quarter more arithmetic."""
    attention: str | None = None
    """A diffusers attention backend such as "native", "flash" or "_native_npu"; unset: diffusers chooses."""
    fp16: Fp16 = Fp16()
    """Loss scaling."""
    timeout: float = Field(1800, gt=0)
    """Seconds that a rank waits for the others before the run ends with an error."""
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


class Checkpoint(Section):
    """What a run keeps so that it can go on."""

    every: int = Field(500, ge=1)
    """Applied steps between two checkpoints; the last step always has one."""
    keep: int = Field(2, ge=1)
    """How many of the newest stay."""


class Preview(Section):
    """Pictures of fixed prompts and seeds, drawn while training."""

    prompts: tuple[str, ...] = ()
    """One picture each; none: no previews."""
    every: int = Field(500, ge=1)
    """Applied steps between two sets of pictures."""
    seed: int = Field(0, ge=0)
    """Where every picture's noise starts, the same each time."""
    steps: int = Field(25, ge=1)
    """Denoising steps."""
    guidance: float = Field(5.0, ge=0)
    """Weight of classifier-free guidance; 1 and less is without."""


class Log(Section):
    """What is said while training."""

    every: int = Field(1, ge=1)
    """Applied steps between two lines of metrics.jsonl; each line is a mean over that many."""


class Export(Section):
    """The trained model as its users load it."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the exported weights."""


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
    model: Model
    method: Annotated[Full | LoRA, Field(discriminator="kind")] = Full()
    """What learns."""
    data: Data
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    engine: Engine = Engine()
    ema: Ema = Ema()
    checkpoint: Checkpoint = Checkpoint()
    preview: Preview = Preview()
    log: Log = Log()
    export: Export = Export()

    _named = field_validator("method", mode="before")(named)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.output / self.name

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.optimizer.lr * (self.batch_size if self.optimizer.scale_lr else 1)

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

    @model_validator(mode="after")
    def _whole(self) -> "Config":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size = {self.batch_size} is not a multiple of micro_batch_size = "
                f"{self.micro_batch_size}; choose a micro_batch_size that divides it"
            )
        if self.method.kind == "lora" and self.method.dora and self.engine.zero_stage == 3:
            raise ValueError(
                "method.dora measures whole layers, which engine.zero_stage = 3 cuts up; take stage 2 or less"
            )
        if self.method.kind == "lora" and self.model.from_scratch:
            raise ValueError('method.kind = "lora" learns beside given weights; unset model.from_scratch')
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} is more than steps = {self.steps}"
            )
        return self


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, or a preset by its name, apply `key=value` overrides and check everything.

    Raises UserError with every mistake found, each with its place and, for a misspelt key, the nearest
    right one.
    """
    path = find(source)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the config {path}", f"it is not valid TOML: {error}", "mend that line") from None
    for override in overrides:
        set_value(values, override)
    return parse(values, str(path))


def find(source: str | Path) -> Path:
    """The file of a config path or a preset name."""
    path = Path(source)
    if path.is_file():
        return path
    preset = PRESETS / f"{source}.toml"
    if preset.is_file():
        return preset
    names = sorted(file.stem for file in PRESETS.glob("*.toml"))
    near = difflib.get_close_matches(str(source), names, 1)
    hint = f'did you mean "{near[0]}"?' if near else f"presets: {', '.join(names)}"
    raise UserError(f"the config {source}", "no such file, and no preset of that name", hint)


def set_value(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` to nested tables; the value is TOML, or a plain string."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"the override {override!r}", "it has no key=value form", "write for example seed=7")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, leaf = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise UserError(
                f"the override {override!r}", f'"{table}" holds a value, not a table', "name a setting"
            )
    values[leaf] = value


def parse(values: dict[str, Any], where: str = "the config") -> Config:
    """Turn nested dictionaries into a Config, or raise one UserError that lists every mistake."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [describe(problem) for problem in error.errors()]
    raise UserError(
        where, "\n       ".join(lines), "correct these settings; docs/config.md lists them all"
    ) from None


def describe(problem: Any) -> str:
    """One line for one of pydantic's problems, naming the setting as the user writes it."""
    place = [str(part) for part in problem["loc"]]
    setting = ".".join(place) or "the file"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], known_keys(place[:-1]), 1, cutoff=0.5)
        return f"unknown key {setting}" + (
            f"; did you mean {'.'.join([*place[:-1], near[0]])}?" if near else ""
        )
    if problem["type"] == "missing":
        return f"{setting} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message if problem["type"] == "value_error" else f"{setting} = {problem['input']!r}: {message}"


def known_keys(tables: Sequence[str]) -> list[str]:
    """The keys that may stand in a table, named by its path; [] where anything may."""
    section: type[BaseModel] = Config
    for table in tables:
        field = section.model_fields.get(table)
        if (
            field is None
            or not isinstance(field.annotation, type)
            or not issubclass(field.annotation, BaseModel)
        ):
            return []
        section = field.annotation
    return list(section.model_fields)
