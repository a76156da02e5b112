"""fp16's loss scale, as DeepSpeed's scaler keeps it."""

from typing import Any

REMEMBERED = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's scaler knows of the steps before; of these a fixed one has the first alone."""


class LossScale:
    """The factor of a run's losses; 1 where the arithmetic needs none."""

    def __init__(self, scaler: Any) -> None:
        """scaler: one of DeepSpeed's, or None.

        Where it can fall no more it would end the process; it is kept from that, for whoever asks `can_fall`
        knows what to say.
        """
        self.scaler = scaler
        self.before: dict[str, Any] = {}
        """What the scaler knew before the last attempt at a step."""
        if self.dynamic:
            scaler.raise_error_at_min_scale = False

    @property
    def dynamic(self) -> bool:
        """Whether the scale follows overflows."""
        return bool(getattr(self.scaler, "dynamic", False))

    @property
    def floor(self) -> float:
        """The smallest scale there is."""
        return float(self.scaler.min_scale) if self.dynamic else 1.0

    @property
    def can_fall(self) -> bool:
        """Whether the last attempt, if it overflowed, may succeed with a smaller scale."""
        return self.dynamic and self.before["cur_scale"] > self.floor

    def remember(self) -> None:
        """Keep what the scaler knows; called before each attempt at a step."""
        self.before = {key: getattr(self.scaler, key) for key in REMEMBERED if hasattr(self.scaler, key)}

    def restore(self, before: dict[str, Any]) -> None:
        """Make the scaler know what `before` says."""
        for key, value in before.items():
            setattr(self.scaler, key, value)
