"""vLLM 0.32: on CPU, LoRA changes the base model's answers in mixed batches, and copies weights per token.

vLLM's CPU operations (``vllm.lora.ops.torch_ops``) look up ``weights[index of each token]``. That copies the
adapter's matrices once per token, which costs far more than the multiplication. For tokens without an adapter
(index -1) it takes the *last* adapter's, so the base model's answers change when adapters are served in the
same batch. Here tokens are grouped by adapter: one multiplication per group, none for -1. GPU engines have
other kernels and are not changed.

The functions have the names and positional parameters of ``vllm.lora.ops.torch_ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# While decoding, finding the groups takes longer than multiplying the other adapters' tokens by zero.
_FEW_ROWS = 256


def install() -> None:
    """Puts these operations in the place of vLLM's. Called by the vLLM plugin."""
    from vllm.lora.punica_wrapper import punica_cpu

    for name, operation in OPERATIONS.items():
        setattr(punica_cpu, name, operation)


def _multiply(inputs: Tensor, weights: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """inputs (T, I), weights (A, O, I) or (A, 1, O, I), indices (T) in -1..A-1 → (T, O); zero for -1."""
    if weights.ndim == 4:
        weights = weights.squeeze(1)
    inputs = inputs[: len(indices)].to(dtype)
    outputs = torch.zeros(len(indices), weights.shape[1], dtype=dtype)
    if len(indices) * len(weights) <= _FEW_ROWS:
        for index, matrix in enumerate(weights):
            outputs += (inputs * (indices == index).unsqueeze(1)) @ matrix.to(dtype).T
        return outputs
    for index in torch.unique(indices).tolist():
        if index < 0:
            continue
        rows = (indices == index).nonzero(as_tuple=True)[0]
        if len(rows) == len(indices):
            return inputs @ weights[index].to(dtype).T
        outputs[rows] = inputs[rows] @ weights[index].to(dtype).T
    return outputs


def bgmv_shrink(
    inputs: Tensor, weights: Tensor, output_tensor: Tensor, indices: Tensor, scaling: float = 1.0
) -> None:
    """output[:, :r] = scaling · A x, one adapter per token."""
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


def _per_sequence(operation: Callable[..., None]) -> Callable[..., None]:
    """The operation with one adapter per sequence; vLLM passes all parameters by position."""

    def run(
        inputs: Tensor,
        weights: Tensor,
        output: Tensor,
        _: Tensor,
        lengths: Tensor,
        indices: Tensor,
        *rest: Any,
    ) -> None:
        # Number and longest of the sequences, number of tokens: not needed.
        parameters = rest[3:]
        operation(inputs, weights, output, torch.repeat_interleave(indices, lengths), *parameters)

    return run


OPERATIONS: dict[str, Callable[..., None]] = {
    "bgmv_shrink": bgmv_shrink,
    "bgmv_expand": bgmv_expand,
    "bgmv_expand_slice": bgmv_expand_slice,
    "sgmv_shrink": _per_sequence(bgmv_shrink),
    "sgmv_expand": _per_sequence(bgmv_expand),
    "sgmv_expand_slice": _per_sequence(bgmv_expand_slice),
}
