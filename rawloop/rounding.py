"""Stochastic rounding to bfloat16, and the float32 stand-ins through which an optimizer updates bfloat16 weights.

An update below half a unit in the last place of a weight rounds to nothing. If it is rounded at random, up as often as
it is large, the weight moves by the update in the mean, and no float32 copy of the weight has to be kept.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rawloop.errors import UserError
from rawloop.seed import derive_seed
from rawloop.sharding import is_sharded, own_part, part_of, sharded_from, start_of_part

CHUNK = 2**22  # numbers that are rounded at a time, with a seed of their own
CHUNK_OF_CPU = 2**16  # stays in its cache
LARGEST = torch.finfo(torch.bfloat16).max


@torch.no_grad()
def round_stochastically(
    numbers: Tensor,
    generator: torch.Generator,
    key: Sequence[int | str],
    start: int = 0,
    size: int = CHUNK,
    total: int | None = None,
) -> None:
    """Round float32 numbers to numbers that bfloat16 has, in place: each to one of its two neighbours, at random.

    The nearer a neighbour, the more probable it is, so that the mean is the number itself (Gupta et al., 2015,
    arXiv:1502.02551, section 3.1). A number that bfloat16 has stays. One above its largest finite number (3.39e38)
    becomes that, with its sign; infinities and NaN stay. Nothing is read from the device.

    Args:
        numbers: float32, contiguous.
        generator: of the same device; is seeded here.
        key: what the random numbers depend on, beside each number's place.
        start: the place of the first number, if these are a part of a larger tensor.
        size: of the chunks.
        total: how many numbers the larger tensor has.
    """
    flat, end = numbers.view(-1), start + numbers.numel()
    total = end if total is None else total
    for chunk in range(start // size, -(-end // size)):
        first = max(start, chunk * size)
        part, skipped = flat[first - start : (chunk + 1) * size - start], first - chunk * size
        generator.manual_seed(derive_seed("rounding", *key, chunk))
        # As many as the whole tensor needs: on a GPU a number depends on how many are drawn.
        drawn = part.new_empty(-(-min(size, total - chunk * size) // 4), dtype=torch.int64)
        drawn.random_(-(2**63), None, generator=generator)
        # The lower 16 of the 32 bits are the distance from the neighbour that is nearer to zero, in 2^-16 of the gap.
        noise = drawn.view(torch.int16)[skipped : skipped + len(part)].int().bitwise_and_(0xFFFF)
        noise.mul_(part.abs() < LARGEST)  # not of NaN either, whose bits could become those of zero
        part.view(torch.int32).add_(noise).bitwise_and_(-0x10000)


def expected_change(weight: Tensor, size: Tensor | float) -> Tensor:
    """Return the probability that stochastic rounding changes each number of a weight, of an update of this size.

    Args:
        weight: bfloat16.
        size: is added to it, in float32.
    """
    before = weight.float()
    bits = (before + size).view(torch.int32)
    lower, above = bits.bitwise_and(-0x10000), bits.bitwise_and(0xFFFF) / 2**16
    stays = torch.where(lower.view(torch.float32) == before, 1 - above, torch.zeros_like(above))
    return 1 - torch.where((lower + 0x10000).view(torch.float32) == before, above, stays)


class StochasticRounding:
    """Lends float32 numbers to an optimizer's parameters for the time of an update, and rounds them stochastically.

    The random numbers depend on the seed, the number of updates before, the weight's name and the number's place in it.
    So a resumed run continues bit for bit, ranks with the same gradients keep the same weights, and no other random
    stream moves.

    Args:
        device: of the weights.
        seed: the same on all ranks.
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device, self.seed, self.updates = device, seed, 0
        self.chunk = CHUNK_OF_CPU if device.type == "cpu" else CHUNK
        self._generator = torch.Generator(device)

    def stand_in(self, weight: nn.Parameter) -> nn.Parameter:
        """Return a float32 parameter for an optimizer to hold in place of a bfloat16 weight.

        It has the shape of the weight, takes 4 bytes, and is NaN except during an update.
        """
        rest = self._nothing(part_of(weight.detach()))
        made = nn.Parameter(sharded_from(rest, weight) if is_sharded(weight) else rest)
        setattr(made, BEHIND, weight)
        return made

    def fill(self, stand_ins: Iterable[nn.Parameter]) -> None:
        """Give stand-ins the numbers of their weights, in the same order in memory: fused optimizers rely on it."""
        for each in stand_ins:
            weight = part_of(weight_behind(each).detach())
            own_part(each).data = torch.empty_like(weight, dtype=torch.float32, device=self.device).copy_(weight)

    def write(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Round the numbers of stand-ins into their weights, by name, and take them away again."""
        for name, each in named:
            weight, numbers = weight_behind(each), own_part(each).data.contiguous()
            key, start = (self.seed, self.updates, name), start_of_part(weight)
            round_stochastically(numbers, self._generator, key, start, self.chunk, weight.numel())
            part_of(weight.data).copy_(numbers)
            own_part(each).data = self._nothing(numbers)

    def _nothing(self, like: Tensor) -> Tensor:
        return torch.full((), torch.nan, device=self.device).expand(like.shape)

    def check(self) -> None:
        """Round a number between two neighbours on the device. This waits for it.

        Raises:
            UserError: it fails, or does not give both neighbours and nothing else.
        """
        try:
            numbers = torch.full((64,), 1 + 2**-8, device=self.device)
            round_stochastically(numbers, self._generator, [self.seed])
            found = "" if set(numbers.tolist()) == {1.0, 1 + 2**-7} else "it gives other numbers"
        except (RuntimeError, TypeError) as error:
            found = str(error).splitlines()[0]
        if found:
            raise UserError(
                f"precision.masters is 'stochastic', and this {self.device.type} does not round so ({found}): "
                "set it to fp32, or leave precision.trainable_dtype out"
            )


BEHIND = "weight_behind"  # an attribute of a stand-in


def weight_behind(parameter: Tensor) -> Tensor:
    """Return the weight whose numbers an optimizer's parameter stands in for; any other parameter as it is."""
    found: Tensor = getattr(parameter, BEHIND, parameter)
    return found
