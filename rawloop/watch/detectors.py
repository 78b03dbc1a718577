"""All kinds of detectors that a watch looks with."""

from rawloop.watch.batches import Batches
from rawloop.watch.changed import ChangedWeights
from rawloop.watch.differing import RankWeights
from rawloop.watch.headroom import Headroom
from rawloop.watch.jumps import Jumps
from rawloop.watch.leaks import Leaks
from rawloop.watch.look import Look
from rawloop.watch.misuse import Misuse
from rawloop.watch.optimizer import OptimizerState
from rawloop.watch.rates import LearningRates
from rawloop.watch.reach import Reach
from rawloop.watch.repeats import RankBatches
from rawloop.watch.scale import LossScale
from rawloop.watch.subject import Detector
from rawloop.watch.updates import Updates
from rawloop.watch.weights import UnsoundWeights


def all_detectors() -> list[Detector]:
    """Return a new detector of every kind."""
    rates = LearningRates()  # shared: updates are judged by the learning rate's history
    optimizers = [rates, Updates(rates), OptimizerState()]
    look = Look()  # shared, so that modules and gradients are measured once
    measured = [look, Headroom(look), Reach(look), LossScale(look)]
    weights = [UnsoundWeights(), ChangedWeights(), RankWeights()]
    return [*weights, Misuse(), *optimizers, Batches(), RankBatches(), Leaks(), *measured, Jumps()]
