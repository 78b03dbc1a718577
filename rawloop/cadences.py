"""Settings that count steps, against the number of steps of the run: what has no effect, before the model is loaded."""

from collections.abc import Iterator

from rawloop.config import RunConfig
from rawloop.optim import lr_at

LONG_WARMUP = 0.5  # of the run


def cadence_notices(config: RunConfig, total: int, num_samples: int, window: float) -> Iterator[str]:
    """Yield a line about the length of the run, and one for each setting that cannot have the effect it is set for.

    Args:
        total: steps of the run.
        num_samples: samples of the training set.
        window: samples of a step, over all ranks; a mean if it is no int.
    """
    epochs = total * window / num_samples
    limit = "train.max_steps" if config.train.max_steps else f"train.epochs {config.train.epochs:g}"
    size = window if isinstance(window, int) else f"about {window:.0f}"
    yield f"{total} steps of {size} samples ({limit}): {epochs:.3g} epochs of {num_samples:,} samples"
    yield from _of_warmup(config, total)
    evaluation, save_every = config.evaluation, config.checkpoint.save_every
    if evaluation.enabled and evaluation.every > total:
        yield (
            f"evaluation.every is {evaluation.every}, and the run ends at step {total}: it is evaluated at step 0 and "
            "at the end only"
        )
    if save_every > total:
        saved = "at the end only" if config.checkpoint.save_at_end else "never, except where an evaluation is the best"
        yield f"checkpoint.save_every is {save_every}, and the run ends at step {total}: it is saved {saved}"
    if (log_every := config.train.log_every) > total:
        yield f"train.log_every is {log_every}, and the run ends at step {total}: it logs the last step only"


def _of_warmup(config: RunConfig, total: int) -> Iterator[str]:
    optim = config.optim
    warmup = optim.warmup(total)
    key = f"optim.warmup_steps is {warmup}" if optim.warmup_steps else f"optim.warmup_ratio is {optim.warmup_ratio:g}"
    if warmup > total:
        yield (
            f"{key}, and the run ends at step {total}: the learning rate comes to "
            f"{lr_at(total - 1, total, optim):.3g} and never to optim.lr, {optim.lr:.3g}; lower it, or set "
            "optim.warmup_ratio 0.03 in its place"
        )
    elif warmup > LONG_WARMUP * total:
        yield (
            f"{key}, and the run ends at step {total}: {warmup / total:.0%} of it is warm-up; the learning rate comes "
            f"to optim.lr, {optim.lr:.3g}, at step {warmup}"
        )
