"""What the fork server imports last: what a rank would import late, and caches that depend on nothing.

Imported for that alone. No thread is started here: a fork would not have it.
"""

import contextlib
import gc
import importlib

from PIL import Image
from transformers import conversion_mapping

from sfumato.engine import content
from sfumato.report.page import paper

LATE = (
    *("sfumato.data.sources.kinds", "sfumato.data.sources.rows", "sfumato.data.sources.tars"),
    *("sfumato.sample", "sfumato.cache", "numpy.ma", "numpy.ctypeslib", "torch.profiler"),
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.module_inject.auto_ep_presets"),
    *("deepspeed.comm.mori", "peft.tuners.lora.bnb"),
    *("diffusers.schedulers.scheduling_ddpm", "diffusers.schedulers.scheduling_unipc_multistep"),
)
for name in LATE:
    with contextlib.suppress(ImportError):  # it costs a moment in each rank, no more
        importlib.import_module(name)
Image.init()
conversion_mapping.get_checkpoint_conversion_mapping("clip")
content.versions()
for page in paper.HOME.glob("*.html"):  # compiled they are a tenth of a toy's run
    paper.printer().get_template(page.name)
# Half a second for every look of the collector through all of that, and each look copies its pages.
gc.collect()
gc.freeze()
