"""Weights, gradients and optimizer state sharded over the ranks, by torch's FSDP2 (`fully_shard`).

Between two passes each rank holds its part of every weight, a DTensor. A pass gathers the weights of one block at a
time, so a model is called through the module that was sharded, by all ranks together. Checkpoints hold whole tensors:
`whole` gathers them, `write_part` takes this rank's part of them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rawloop.errors import RawloopError, UserError
from rawloop.layers import block_lists

SHARE = 0.25


class BlockRuns:
    """What this rank has run of a sharded `module`: its `blocks`, and a digest of the order.

    Each run gathers weights from all ranks. If ranks run different blocks, they compute with wrong weights.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.module, self.blocks, self.digest = module, blocks, 0
        for number, block in enumerate(blocks, start=1):
            # Compiled with the block, the count would be a constant of its code.
            hook = torch.compiler.disable(partial(self._add, number))  # type: ignore[no-untyped-call]
            block.register_forward_pre_hook(hook)

    def _add(self, number: int, *_: Any) -> None:
        self.digest = (31 * self.digest + number) % 2**20  # its square is exact in float64

    @contextmanager
    def gathering(self) -> Iterator[dict[int, nn.Parameter]]:
        """Yield a dict that passes inside fill: id of a whole weight, a leaf of their graph -> its sharded weight."""
        found: dict[int, nn.Parameter] = {}
        places = [
            (part, {name: weight for name, weight in part.named_parameters() if is_sharded(weight)})
            for part in (self.module, *self.blocks)
        ]

        def look(sharded: dict[str, nn.Parameter], part: nn.Module, *_: Any) -> None:
            now = part.named_parameters()  # of the blocks inside, the weights are gathered later
            found.update(
                {id(weight): sharded[name] for name, weight in now if not is_sharded(weight) and name in sharded}
            )

        # after the hooks of FSDP, which gather
        hooks = [part.register_forward_pre_hook(partial(look, sharded)) for part, sharded in places]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def shard(module: nn.Module, device: torch.device) -> BlockRuns:
    """Shard all weights of a module over the ranks, in place, and move them to the device of this rank.

    A module on the CPU is moved block by block: the device never holds more than its part and one block, or what is
    outside of blocks. Each block of `find_blocks` is gathered alone, the other weights together while `module` runs.
    The parameters become other objects; until the first pass `assign` may change their dtypes. A weight that is unused
    on a rank gets a gradient of zero there. Frozen scalars stay whole.

    Returns:
        the blocks, and what is run of them from now on.

    Raises:
        UserError: there is one process, or a scalar weight is trained.
        RawloopError: this version of torch lacks a method.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        raise UserError("one process cannot shard its weights: start several with torchrun")
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise RawloopError(f"sharding needs torch 2.13 or later, and this is {torch.__version__}: upgrade torch")
    scalars = {name: weight for name, weight in module.named_parameters() if not weight.ndim}
    trained = [name for name, weight in scalars.items() if weight.requires_grad]
    if trained:
        raise UserError(f"{trained[0]} is trained and has no dimension to shard: freeze it, or set parallel to ddp")
    blocks = find_blocks(module)
    mesh = init_device_mesh(device.type, (size,))
    for part in [*blocks, module]:
        # Resharded after each pass, also the root, so that `parameters()` is always this rank's part.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=set(scalars.values()))
    for scalar in scalars.values():
        scalar.data = scalar.data.to(device)
    module.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
    return BlockRuns(module, blocks)


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model's `block_lists`.

    Left out, and so gathered with the other weights: blocks that share a weight with a module outside of them, and
    lists that have less than `SHARE` of the weights of all lists, such as an audio encoder, which a batch without audio
    would not run. A loss may use a head's weights without calling it, so heads are none.
    """
    owners: dict[int, set[str]] = {}
    lists = block_lists(module)
    found = {f"{name}.{key}": block for name, blocks in lists.items() for key, block in blocks.named_children()}
    for name, weight in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), set()).add(next((b for b in found if name.startswith(f"{b}.")), ""))
    shared = {block for names in owners.values() if len(names) > 1 for block in names}
    sizes = {name: sum(weight.numel() for weight in block.parameters()) for name, block in found.items()}
    of_lists: Counter[str] = Counter()
    for name, size in sizes.items():
        of_lists[name.rpartition(".")[0]] += size
    least = max(1.0, SHARE * of_lists.total())
    return [block for name, block in found.items() if name not in shared and of_lists[name.rpartition(".")[0]] >= least]


def is_sharded(thing: Tensor | nn.Module) -> bool:
    """Return whether a tensor is one rank's part of a whole, or whether a module has such weights."""
    if isinstance(thing, nn.Module):
        return any(map(is_sharded, thing.parameters()))
    return hasattr(thing, "full_tensor")


def reset(module: nn.Module) -> None:
    """Make a sharded module ready for another pass after one that failed on all ranks. All of them call this.

    The pass has left whole weights, gradients of them, and marks of how far it came. Without them `parameters()` are
    this rank's parts again, and the next pass gathers and reduces as usual. A module that is not sharded stays as it
    is.

    Args:
        module: what `shard` was given.
    """
    root: Any = module
    if hasattr(root, "reset_iter_state"):
        for weight in module.parameters():
            if not is_sharded(weight):
                weight.grad = None  # of a whole weight, to which the next pass would add
        root.reset_iter_state()


@contextmanager
def unreduced(module: Any) -> Iterator[None]:
    """Add up gradients on each rank inside the context, whole; the next backward pass outside reduces them."""
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def part_of(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, in the same memory; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    own: Tensor = sharded.to_local()
    return own


def parts_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's parts, without a graph: `torch._foreach_*` functions do not know all sharded tensors."""
    return [part_of(tensor.detach()) for tensor in tensors]


def own_part(tensor: Tensor) -> Tensor:
    """Return the tensor that holds this rank's part, of which `.data` may be set; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    own: Tensor = sharded._local_tensor  # `to_local` returns a view, whose `.data` is another
    return own


def sharded_from(part: Tensor, like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return this rank's part as a tensor that is sharded as `like` is. Without communication.

    The whole has the shape of `like`, or another `shape` with one dimension.
    """
    from torch.distributed.tensor import DTensor

    target: Any = like
    mesh, placements = target.device_mesh, target.placements
    size, stride = (like.shape, like.stride()) if shape is None else (torch.Size(shape), (1,))
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=size, stride=stride)


def start_of_part(tensor: Tensor) -> int:
    """Return the place in the whole, in row-major order, at which this rank's part begins; 0 for a plain tensor."""
    if not is_sharded(tensor):
        return 0
    sharded: Any = tensor
    rows: int = -(-tensor.shape[0] // sharded.device_mesh.size())  # of each rank's part, but for the last ones
    first: int = min(sharded.device_mesh.get_local_rank() * rows, tensor.shape[0])
    return first * math.prod(tensor.shape[1:])


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on rank 0; the other ranks get an empty tensor. A plain tensor is returned as it is.

    All ranks call this. The device holds the whole tensor until it is freed.
    """
    if not is_sharded(tensor):
        return tensor
    found = gathered(tensor)
    return found if dist.get_rank() == 0 else found.new_empty(0)


def gathered(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on all ranks, which call this together. A plain tensor is returned as it is."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    found: Tensor = sharded.full_tensor()
    return found


@contextmanager
def lent_weights(form: nn.Module, model: nn.Module) -> Iterator[nn.Module]:
    """Lend `form`, a copy of a sharded model, its whole weights and buffers on every rank. Hooks of FSDP are not in it.

    All ranks enter together; inside, each calls the copy as often as it likes, without the others. Weights are taken
    away on exit. The device holds all of them until then.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Tensor] = {}
    try:
        weights, buffers = (named(remove_duplicate=False) for named in (model.named_parameters, model.named_buffers))
        for name, tensor in [*weights, *buffers]:  # each place of a shared one
            if id(tensor) not in made:
                whole_one = gathered(tensor.detach())
                made[id(tensor)] = nn.Parameter(whole_one, False) if isinstance(tensor, nn.Parameter) else whole_one
            path, _, key = name.rpartition(".")
            owner = form.get_submodule(path)
            places: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
            if key not in places:
                continue  # a cache that a pass of the model has made: the copy makes its own
            kept.append((places, key, places[key]))
            places[key] = made[id(tensor)]
        yield form
    finally:
        for places, key, before in kept:
            places[key] = before


def sharded_as(values: Tensor, like: Tensor) -> Tensor:
    """Return whole values as a tensor that is sharded as `like` is, if `like` is sharded. Without communication."""
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    target: Any = like
    return distribute_tensor(values.detach(), target.device_mesh, target.placements, src_data_rank=None)


def assign(weight: nn.Parameter, values: Tensor) -> None:
    """Give a weight other values of the same shape, perhaps in another dtype. It stays the same object.

    A sharded weight takes values that are sharded like it, and only before the first pass.
    """
    if is_sharded(weight):
        with torch.no_grad():  # assigning to `.data` would keep the part of before
            torch.utils.swap_tensors(weight, nn.Parameter(values.detach(), weight.requires_grad))  # type: ignore[no-untyped-call]
    else:
        weight.data = values


def write_part(target: Tensor, values: Tensor) -> None:
    """Copy whole values into a tensor; if it is sharded, copy this rank's part of them."""
    with torch.no_grad():
        part_of(target).copy_(part_of(sharded_as(values, target)))


def over_ranks(number: Tensor) -> Tensor:
    """Return a reduction of a sharded tensor, which each rank has of its own part, over all ranks. They all call it."""
    sharded: Any = number
    whole: Tensor = sharded.full_tensor() if is_sharded(number) else number
    return whole


def norm_over_ranks(norm: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm of sharded tensors from this rank's part of it, on the device: the host does not wait.

    All ranks call this. If the tensors are plain, their norm is returned as it is.
    """
    sharded: Any = next(filter(is_sharded, tensors), None)
    if sharded is None:
        return norm
    square = norm.double().square()
    dist.all_reduce(square, group=sharded.device_mesh.get_group())
    return square.sqrt().to(norm.dtype)
