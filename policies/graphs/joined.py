"""Linear layers that read the same input, as one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .footing import hooked


def one_product(modules: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """What each of `modules` says of the same input, [..., d] -> [..., d_i] each.

    Plain linear layers of one dtype become one product: their weights, and biases, are laid one
    behind the other in one tensor and stay theirs as views of it, so nothing is held twice. Others,
    and those that are hooked, are called one by one.
    """
    if not plain(modules):
        return lambda x: [module(x) for module in modules]
    layers: list[Any] = list(modules)
    weight = _whole([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else _whole([layer.bias for layer in layers])
    sizes = [layer.out_features for layer in layers]
    return lambda x: F.linear(x, weight, bias).split(sizes, -1)


def plain(modules: Sequence[nn.Module]) -> bool:
    """Whether all are plain linear layers of one dtype on one device, with a bias or all without,
    and none is hooked."""
    biases = {getattr(module, "bias", None) is None for module in modules}
    own = [parameter for module in modules for parameter in module.parameters()]
    kinds = {(parameter.dtype, parameter.device) for parameter in own}
    alike = len(biases) == len(kinds) == 1
    return alike and all(map(_is_plain, modules)) and all(map(_is_dense, own))


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not hooked(module)


def _is_dense(parameter: nn.Parameter) -> bool:
    """Quantised weights may be tensors of a type of their own, inside a Linear that looks plain."""
    return type(parameter) is nn.Parameter and type(parameter.data) is Tensor


def _whole(parts: Sequence[nn.Parameter]) -> Tensor:
    """Parameters [n_i, ...] as one tensor [sum of n_i, ...] that they are views of."""
    first = parts[0]
    n = sum(len(part) for part in parts)
    if all(_follows(b, a) for a, b in pairwise(parts)):
        return first.detach().as_strided((n, *first.shape[1:]), first.stride())
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        whole = torch.cat([part.detach() for part in parts])
        for part, own in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = own
    return whole


def _follows(later: Tensor, earlier: Tensor) -> bool:
    """Whether `later` begins where `earlier` ends, in one storage."""
    same = later.untyped_storage().data_ptr() == earlier.untyped_storage().data_ptr()
    end = earlier.storage_offset() + earlier.numel()
    dense = later.is_contiguous() and earlier.is_contiguous()
    return same and dense and later.dtype == earlier.dtype and later.storage_offset() == end
