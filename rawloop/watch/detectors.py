"""All kinds of detectors that a watch looks with."""

from rawloop.watch.batches import Batches
from rawloop.watch.calls import Calls
from rawloop.watch.changed import ChangedWeights
from rawloop.watch.jumps import Jumps
from rawloop.watch.leaks import Leaks
from rawloop.watch.misuse import Misuse
from rawloop.watch.optimizer import OptimizerSettings, OptimizerState
from rawloop.watch.rates import LearningRates
from rawloop.watch.subject import Detector
from rawloop.watch.updates import Updates
from rawloop.watch.weights import UnsoundWeights


def all_detectors() -> list[Detector]:
    """Return a new detector of every kind."""
    optimizers = [LearningRates(), Updates(), OptimizerSettings(), OptimizerState()]
    return [UnsoundWeights(), ChangedWeights(), Misuse(), *optimizers, Batches(), Calls(), Leaks(), Jumps()]
