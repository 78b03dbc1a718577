"""How numbers are held and computed: modes as rows of one table, and the policy that applies a row."""

from typing import TYPE_CHECKING

from rawloop.lazy import importer

if TYPE_CHECKING:
    from rawloop.precision.gradients import StepResult
    from rawloop.precision.modes import MODES, Mode, PrecisionConfig
    from rawloop.precision.policy import PrecisionPolicy
    from rawloop.precision.scaler import LossScaleConfig
else:
    __getattr__ = importer(
        __name__,
        {
            "LossScaleConfig": "rawloop.precision.scaler",
            "MODES": "rawloop.precision.modes",
            "Mode": "rawloop.precision.modes",
            "PrecisionConfig": "rawloop.precision.modes",
            "PrecisionPolicy": "rawloop.precision.policy",
            "StepResult": "rawloop.precision.gradients",
        },
    )

__all__ = ["MODES", "LossScaleConfig", "Mode", "PrecisionConfig", "PrecisionPolicy", "StepResult"]
