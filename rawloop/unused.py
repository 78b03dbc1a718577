"""Trained weights that the first batch leaves unused, and what DDP is told of them."""

from dataclasses import replace

from rawloop.dist import DDPConfig, World
from rawloop.errors import UserError


def decide_find_unused(config: DDPConfig, world: World, unused: list[str]) -> tuple[DDPConfig, str | None]:
    """Decide on `find_unused_parameters` from what the first batch left unused on each rank. All ranks call this.

    Args:
        config: true, false or auto.
        world: the ranks.
        unused: names of the trained parameters that got no gradient on this rank.

    Returns:
        the config with true or false, and a sentence for the user if there is something to say.

    Raises:
        UserError: it is false, and DDP would wait for ever or let the ranks drift apart.
    """
    shares = world.gather(unused)
    everywhere = [name for name in shares[0] if all(name in share for share in shares)]
    partly = sorted({name for share in shares for name in share} - set(everywhere))
    found = _unused_in_words(everywhere, "on any rank" if world.size > 1 else "") + _unused_in_words(
        partly, "on some ranks"
    )
    if not found:
        return replace(config, find_unused_parameters=config.find_unused_parameters is True), None
    what = f"the first batch gives no gradient to {' and to '.join(found)}"
    if config.find_unused_parameters is False and world.size > 1:
        raise UserError(
            f"ddp.find_unused_parameters is false, and {what}: DDP would wait for ever, or let the ranks drift apart. "
            "Set it to true or auto, or freeze these weights (adapter.freeze)"
        )
    advice = "weights that no batch uses are never trained: freeze them (adapter.freeze), or check the data"
    return replace(config, find_unused_parameters=True), f"{what}; {advice}"


def _unused_in_words(names: list[str], where: str) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{len(names)} trained weights{' ' if where else ''}{where} ({', '.join(names[:5])}{more})"]
