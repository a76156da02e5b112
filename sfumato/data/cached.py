"""What is read from the store in place of being encoded, and the keys that it lies under.

A key covers everything that the tensor depends on: the file's bytes or the text, the cut, the encoder's
weights and arithmetic, and what is kept of its answer. Nothing stale can be found under it.
"""

from dataclasses import dataclass

from torch import Tensor

from sfumato.data.store import Store, key_of
from sfumato.data.transforms import RENDERING, Geometry


@dataclass(frozen=True)
class Cached:
    """A run's view of the store."""

    store: Store
    images: str | None
    """What the VAE is, and whether its mean alone is kept. None: pixels are encoded while training."""
    captions: str | None
    """What the text encoders are, likewise."""

    def image_key(self, digest: bytes, cut: Geometry) -> bytes:
        """The key of {"moments": (2c or c, h, w)}; digest: of the image file's bytes."""
        cuts = (*cut.resized, *cut.window, *cut.target, int(cut.flip))
        return key_of("image", RENDERING, self.images, digest, *cuts)

    def caption_key(self, caption: str | None) -> bytes:
        """The key of an encoded caption, tensors without the batch's axis; None: the unconditional one."""
        return key_of("caption", self.captions, caption)

    def moments(self, digest: bytes, cut: Geometry) -> Tensor | None:
        """An image's moments, None if they are not there."""
        found = self.find(self.image_key(digest, cut))
        return None if found is None else found["moments"]

    def caption(self, caption: str | None) -> dict[str, Tensor] | None:
        """An encoded caption, None if it is not there."""
        return self.find(self.caption_key(caption))

    def find(self, key: bytes) -> dict[str, Tensor] | None:
        """A record of the store, or None."""
        try:
            return self.store.get(key)
        except KeyError:
            return None
