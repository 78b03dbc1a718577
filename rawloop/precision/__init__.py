"""How numbers are held and computed: modes as rows of one table, and the policy that applies a row."""

from rawloop.precision.policy import MODES, Mode, PrecisionConfig, PrecisionPolicy, StepResult

__all__ = ["MODES", "Mode", "PrecisionConfig", "PrecisionPolicy", "StepResult"]
