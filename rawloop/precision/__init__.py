"""How numbers are held and computed: modes as rows of one table, and the policy that applies a row."""

from rawloop.precision.modes import MODES, Mode, PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy, StepResult
from rawloop.precision.preflight import preflight
from rawloop.precision.scaler import LossScaleConfig

__all__ = ["MODES", "LossScaleConfig", "Mode", "PrecisionConfig", "PrecisionPolicy", "StepResult", "preflight"]
