"""Frozen linear layers in 4 or 8 bits, beside which LoRA trains (QLoRA, arXiv:2305.14314).

Only the weights are quantised. A pass computes with the numbers that they stand for, in the dtype of the pass, so the
modes of precision work as with whole weights.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rawloop.adapters.fingerprint import ADAPTERS, own_name
from rawloop.adapters.lora import kinds
from rawloop.errors import UserError
from rawloop.layers import is_embedding_or_head

BLOCK = 64  # numbers of a block of nf4, which share a scale
WIDE = torch.float32


class Kind(NamedTuple):
    """A quantisation: `pack` returns codes and float32 scales of a matrix, `unpack` its numbers in a dtype."""

    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]
    package: str = ""


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = torch.ops.bitsandbytes.quantize_4bit(weight.float(), BLOCK, "nf4", torch.uint8)
    return codes, scales


def _unpack_nf4(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    known = dtype if dtype in (torch.float16, torch.bfloat16) else WIDE
    numbers: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, known)
    return numbers.to(dtype)


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = weight.float()
    scales = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(WIDE).tiny) / 127
    return (wide / scales).round().to(torch.int8), scales


def _unpack_int8(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return (codes * scales).to(dtype)


KINDS = {"nf4": Kind(_pack_nf4, _unpack_nf4, "bitsandbytes"), "int8": Kind(_pack_int8, _unpack_int8)}


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose matrix is quantised.

    Args:
        linear: the layer. Its bias is kept.
        name: nf4 or int8.
        device: where the matrix is quantised.
    """

    def __init__(self, linear: nn.Linear, name: str, device: torch.device) -> None:
        super().__init__()
        self.kind, self.shape = KINDS[name], linear.weight.shape
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scales = self.kind.pack(linear.weight.detach().to(device))
        self.codes, self.scales = nn.Parameter(codes, requires_grad=False), nn.Buffer(scales, persistent=False)
        self.bias = linear.bias

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the codes stand for, of shape (out_features, in_features)."""
        return self.kind.unpack(self.codes, self.scales, self.shape, dtype)

    @property
    def weight(self) -> Tensor:
        """The numbers in float32, for code that reads a linear layer's weight."""
        return self.numbers(WIDE)

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply as a linear layer does, in autocast's dtype or that of the inputs."""
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        result: Tensor = _Multiply.apply(inputs.to(dtype), self)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Return the sizes, as a linear layer does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Multiply(torch.autograd.Function):
    """Multiplies by a quantised matrix, and unpacks it again for the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(inputs, layer.numbers(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] @ ctx.layer.numbers(gradients[0].dtype), None


def check_quantization(name: str | None) -> None:
    """Raise UserError if a quantisation needs a package that is not installed; import the package."""
    package = KINDS[name].package if name else ""
    if package and find_spec(package) is None:
        raise UserError(
            f"model.quantization is '{name}', which needs {package}, and that is not installed: run `pip install "
            f"'rawloop[{package}]'`, or take int8, which needs nothing"
        )
    if package:
        __import__(package)  # registers its operations


def layers_to_quantize(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the frozen linear layers by name, without heads, embeddings, adapters and layers that share a weight."""
    places: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(weight), []).append(name)
    found = {}
    for name, module in model.named_modules():
        apart = is_embedding_or_head(own_name(name))
        added = any(mark in f".{name}." for mark in (*ADAPTERS, ".original_module."))
        if type(module) is not nn.Linear or apart or added or module.weight.requires_grad:
            continue
        if len(places[id(module.weight)]) == 1:
            found[name] = module
    return found


def quantize(model: nn.Module, name: str, device: torch.device) -> str:
    """Quantise the frozen linear layers of a model in place, one after the other, on a device.

    Returns:
        a line that says which layers, and how many bytes they take.

    Raises:
        UserError: the model has no such layer.
    """
    layers = layers_to_quantize(model)
    if not layers:
        raise UserError(
            f"model.quantization is '{name}', and the model has no frozen linear layer besides heads and embeddings: "
            "leave it out"
        )
    before = after = 0
    for path, linear in layers.items():
        parent, _, child = path.rpartition(".")
        before += linear.weight.nbytes
        layer = QuantizedLinear(linear, name, device)
        after += layer.codes.nbytes + layer.scales.nbytes
        setattr(model.get_submodule(parent), child, layer)
    named = kinds([own_name(path) for path in layers])
    return f"quantised to {name}: {named}; {after / 1e6:,.1f} MB in place of {before / 1e6:,.1f} MB"


@torch.no_grad()
def round_weights(model: nn.Module, name: str) -> None:
    """Replace the weights of the layers that `quantize` would quantise by the numbers that their codes stand for.

    Of a base model, so that an adapter that was trained beside quantised layers is merged into the same numbers.
    """
    check_quantization(name)
    kind = KINDS[name]
    for linear in layers_to_quantize(model).values():
        weight = linear.weight
        linear.weight.data = kind.unpack(*kind.pack(weight.detach()), weight.shape, WIDE)
