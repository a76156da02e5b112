"""Every setting that a user can say, typed and checked. Imports no torch (a test proves it).

A run is one `Config`, frozen. People write it as TOML; `load` reads the file, applies `key=value`
overrides, and reports every mistake of the file in one message. What depends on more than the file
(the number of ranks, the weights' folder, the data) is checked in `sfumato.check`.
"""

from sfumato.config.data import Buckets, Data, Layout, Part, Prior, Tags
from sfumato.config.method import ControlNet, Full, LoRA, Model, TextualInversion
from sfumato.config.objective import BiasedTimesteps, MinSNRWeight, Objective, UniformTimesteps, UniformWeight
from sfumato.config.reading import PRESETS, beside, find, key_of, load, parse
from sfumato.config.run import Config
from sfumato.config.section import Section
from sfumato.config.training import (
    FASTEST,
    BadNumbers,
    Checkpoint,
    Checkpointing,
    Ema,
    Engine,
    Export,
    Fp16,
    Log,
    Optimizer,
    Preview,
    Profile,
    Validation,
)

__all__ = [
    "BadNumbers",
    "BiasedTimesteps",
    "Buckets",
    "Checkpoint",
    "Checkpointing",
    "Config",
    "ControlNet",
    "Data",
    "Ema",
    "Engine",
    "Export",
    "FASTEST",
    "Fp16",
    "Full",
    "Layout",
    "LoRA",
    "Log",
    "MinSNRWeight",
    "Model",
    "Objective",
    "Optimizer",
    "PRESETS",
    "Part",
    "Preview",
    "Prior",
    "Profile",
    "Section",
    "Tags",
    "TextualInversion",
    "UniformTimesteps",
    "UniformWeight",
    "Validation",
    "beside",
    "find",
    "key_of",
    "load",
    "parse",
]
