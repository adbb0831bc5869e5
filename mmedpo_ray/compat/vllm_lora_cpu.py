"""LoRA in vLLM's CPU engine: right in mixed batches, and without copying weights for every token.

vLLM 0.32's CPU operations look up ``weights[index of each token]``. That copies the adapter's matrices once a token, which
costs far more than the multiplication, and for tokens without an adapter (index -1) it takes the *last* adapter's, so
the base model's answers change when adapters are served in the same batch. Here tokens are grouped by adapter: one
multiplication a group, none for -1. GPU engines have kernels of their own and are not touched.

The functions have the names and parameters of ``vllm.lora.ops.torch_ops``.
"""

# ruff: noqa: ARG001 - the parameters are those that vLLM passes by position.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FEW_ROWS = 256


def install() -> None:
    """Puts these operations in the place of vLLM's. Called by the vLLM plugin."""
    from vllm.lora.punica_wrapper import punica_cpu

    for function in (
        bgmv_shrink,
        bgmv_expand,
        bgmv_expand_slice,
        sgmv_shrink,
        sgmv_expand,
        sgmv_expand_slice,
    ):
        setattr(punica_cpu, function.__name__, function)


def _multiply(inputs: Tensor, weights: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """inputs (T, I), weights (A, O, I) or (A, 1, O, I), indices (T) in -1..A-1 → (T, O), zero where the index is -1."""
    if weights.ndim == 4:
        weights = weights.squeeze(1)
    inputs = inputs.to(dtype)
    outputs = torch.zeros(len(indices), weights.shape[1], dtype=dtype)
    if len(indices) * len(weights) <= _FEW_ROWS:
        # While decoding, finding the groups would take longer than multiplying the other adapters' tokens by zero.
        for index, matrix in enumerate(weights):
            outputs += (inputs[: len(indices)] * (indices == index).unsqueeze(1)) @ matrix.to(dtype).T
        return outputs
    for index in torch.unique(indices).tolist():
        if index < 0:
            continue
        rows = (indices == index).nonzero(as_tuple=True)[0]
        if len(rows) == len(indices):
            return inputs[: len(indices)] @ weights[index].to(dtype).T
        outputs[rows] = inputs[rows] @ weights[index].to(dtype).T
    return outputs


def bgmv_shrink(
    inputs: Tensor, weights: Tensor, output_tensor: Tensor, indices: Tensor, scaling: float = 1.0
) -> None:
    """output[:, :r] = scaling · A x, one adapter a token."""
    product = _multiply(inputs, weights, indices, output_tensor.dtype)
    output_tensor[: len(product), : product.shape[1]] = scaling * product


def bgmv_expand(
    inputs: Tensor, weights: Tensor, output_tensor: Tensor, indices: Tensor, add_inputs: bool = True
) -> None:
    """output (+)= B x; adapter and model may have different padding of the output."""
    width = min(weights.shape[-2], output_tensor.shape[1])
    bgmv_expand_slice(inputs, weights[..., :width, :], output_tensor, indices, 0, width, add_inputs)


def bgmv_expand_slice(
    inputs: Tensor,
    weights: Tensor,
    output_tensor: Tensor,
    indices: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """output[:, offset : offset + size] (+)= B x."""
    product = _multiply(inputs, weights, indices, output_tensor.dtype)[: len(output_tensor)]
    target = output_tensor[: len(product), slice_offset : slice_offset + slice_size]
    if add_inputs:
        target += product
    else:
        target[:] = product


def sgmv_shrink(
    inputs: Tensor,
    weights: Tensor,
    output_tensor: Tensor,
    starts: Tensor,
    lengths: Tensor,
    indices: Tensor,
    batches: int,
    max_length: int,
    num_tokens: int,
    scaling: float,
) -> None:
    """:func:`bgmv_shrink` with one adapter a sequence."""
    bgmv_shrink(inputs, weights, output_tensor, torch.repeat_interleave(indices, lengths), scaling)


def sgmv_expand(
    inputs: Tensor,
    weights: Tensor,
    output_tensor: Tensor,
    starts: Tensor,
    lengths: Tensor,
    indices: Tensor,
    batches: int,
    max_length: int,
    num_tokens: int,
    add_inputs: bool = False,
) -> None:
    """:func:`bgmv_expand` with one adapter a sequence."""
    bgmv_expand(inputs, weights, output_tensor, torch.repeat_interleave(indices, lengths), add_inputs)


def sgmv_expand_slice(
    inputs: Tensor,
    weights: Tensor,
    output_tensor: Tensor,
    starts: Tensor,
    lengths: Tensor,
    indices: Tensor,
    batches: int,
    max_length: int,
    num_tokens: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = False,
) -> None:
    """:func:`bgmv_expand_slice` with one adapter a sequence."""
    exploded: Any = torch.repeat_interleave(indices, lengths)
    bgmv_expand_slice(inputs, weights, output_tensor, exploded, slice_offset, slice_size, add_inputs)
