"""Where samples come from, and what becomes of them."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sfumato.config.section import Section


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


class Prior(Section):
    """Pictures of the same kind of thing, drawn by the model before training, which it is not to forget.

    DreamBooth's prior preservation (arXiv:2208.12242): half of each batch are such pictures. Their captions
    stay as they are, without data.caption_prefix, data.caption_suffix and [data.tags].
    """

    prompt: str = Field(min_length=1)
    """What they show, and their caption: "a photo of a dog" where data.prompt is "a photo of sks dog"."""
    images: int = Field(100, ge=1)
    """How many are drawn, once; they are kept in data.store, and used by every run that asks for the same."""
    weight: float = Field(1.0, gt=0)
    """The mean of their losses counts so many times the mean of the others'."""
    source: str | None = None
    """Ready pictures in place of drawn ones, such as a folder; those with captions of their own keep them."""
    steps: int = Field(25, ge=1)
    """Denoising steps of the drawing."""
    guidance: float = Field(5.0, ge=0)
    """Weight of classifier-free guidance of the drawing."""


class Data(Layout):
    """Where the images and captions come from, and what becomes of them."""

    parts: tuple[Part, ...] = ()
    """Several sources in place of one, each a [[data.parts]]."""
    prior: Prior | None = None
    """Prior preservation; unset: none."""
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
    """Share of records that may be unusable before a run is refused; they are listed, and others take their
    place. Also share of tar shards that may be damaged: of one nobody knows how much is lost."""
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
        """One layout for each part, complete; the prior's is the last, once its pictures' place is known."""
        own = {name: getattr(self, name) for name in Layout.model_fields}
        told = [part.model_dump(exclude={"repeats", "weight"}, exclude_none=True) for part in self.parts]
        layouts = [Layout(**own | values) for values in told or [{}]]
        if self.prior is not None and self.prior.source is not None:
            layouts.append(Layout(source=self.prior.source, prompt=self.prior.prompt))
        return layouts

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
        if self.prior is not None and any(layout.conditioning_column for layout in self.layouts):
            raise ValueError("data.prior's pictures have no second images; unset it or conditioning_column")
        if not self.resolutions or min(self.resolutions) < 8:
            raise ValueError(f"data.resolution = {self.resolution}: give 8 pixels or more")
        if self.buckets is not None and len(self.resolutions) > 1:
            if self.buckets.area is not None or self.buckets.sizes:
                raise ValueError("data.buckets.area and sizes go with one data.resolution")
        return self
