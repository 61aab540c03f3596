"""A LoRA adapter merged into the weight that it adapts, out of place.

    merged = weight + sum_a scaling_a * (B_a @ A_a)                              LoRA, adapters a
    merged = magnitude * V / |V|,   V = weight + scaling * (B @ A)               DoRA, |V| per row of V

Adding the update in place, in bfloat16, rounds away one entry in seven of a small update; so the sum goes to
float32, once. It is formed in float64, band by band: then neither the TF32 or bfloat16 matrix products that a
Trainer may have switched on nor the blocking of a BLAS library can be seen in the result, and every device
gives the same weight. With ranks of 8 to 256 the cost is that of reading the weight.

Legend: M out, N in, R rank, E experts.

Sources: arXiv 2106.09685 (LoRA, Eq. 3), arXiv 2402.09353 (DoRA, Eq. 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BAND = 1 << 22  # elements that are held in float64 at a time


@dataclass(frozen=True, kw_only=True)
class LoraFactors:
    """One adapter of one weight.

    Attributes:
        A_RN: The factor next to the input.
        B_MR: The factor next to the output.
        scaling: Multiplies B @ A: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        magnitude: Length of each row of the merged weight, shape (M,) (DoRA); None for plain LoRA.
    """

    A_RN: Tensor
    B_MR: Tensor
    scaling: float
    magnitude: Tensor | None = None


@torch.no_grad()
def merge_lora(weight: Tensor, adapters: Sequence[LoraFactors], *, transposed: bool = False) -> Tensor:
    """The weight with its adapters added.

    Args:
        weight: Floating point, shape (M, N), or (N, M) where `transposed`. Left as it is.
        adapters: On any device and of any floating dtype. A DoRA adapter stands alone.
        transposed: The weight is stored as (in, out): embeddings, Conv1D, `fan_in_fan_out`.

    Returns:
        float32, contiguous, in the shape and on the device of the weight.

    Raises:
        ValueError: Factors that do not fit the weight, or a DoRA adapter beside another one.

    Example:
        >>> factors = LoraFactors(A_RN=torch.ones(1, 3), B_MR=torch.tensor([[1.0], [2.0]]), scaling=0.5)
        >>> merge_lora(torch.zeros(2, 3), [factors])
        tensor([[0.5000, 0.5000, 0.5000],
                [1.0000, 1.0000, 1.0000]])
    """
    magnitude_M = next((factors.magnitude for factors in adapters if factors.magnitude is not None), None)
    if magnitude_M is not None and len(adapters) > 1:
        raise ValueError(
            f"A DoRA adapter scales the rows of its own sum and stands alone, got {len(adapters)} adapters."
        )
    for factors in adapters:
        _check(weight, factors, transposed)
    left_right = [
        (factors.A_RN.T, factors.B_MR.T) if transposed else (factors.B_MR, factors.A_RN)
        for factors in adapters
    ]
    left_right = [
        (left.to(weight.device), right.to(weight.device, torch.float64)) for left, right in left_right
    ]
    merged = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    squares = torch.zeros(weight.shape[1 if transposed else 0], dtype=torch.float64, device=weight.device)
    step = max(1, _BAND // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        band = weight[rows].to(torch.float64, copy=True)
        for (left, right), factors in zip(left_right, adapters, strict=True):
            band.addmm_(left[rows].to(torch.float64), right, alpha=factors.scaling)
        merged[rows] = band
        if magnitude_M is not None and transposed:
            squares += band.square().sum(0)
        elif magnitude_M is not None:
            squares[rows] = band.square().sum(1)
    if magnitude_M is not None:
        ratio_M = (magnitude_M.to(weight.device, torch.float64) / squares.sqrt()).float()
        merged *= ratio_M if transposed else ratio_M[:, None]
    return merged


@torch.no_grad()
def merge_lora_experts(
    weight: Tensor, adapters: Sequence[LoraFactors], *, transposed: bool = False
) -> Tensor:
    """The stacked weights of experts with their adapters added, expert by expert.

    Args:
        weight: Shape (E, M, N), or (E, N, M) where `transposed`.
        adapters: The factors of all experts in one: A of shape (E * R, N), grouped by expert; B of shape (M,
            R * E), grouped by rank, as PEFT keeps them for `target_parameters`.
        transposed: As for `merge_lora`.

    Returns:
        float32, contiguous, in the shape and on the device of the weight.

    Raises:
        ValueError: As for `merge_lora`.
    """
    experts = weight.shape[0]
    merged = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for e in range(experts):
        of_expert = [
            LoraFactors(
                A_RN=factors.A_RN.reshape(experts, -1, factors.A_RN.shape[-1])[e],
                B_MR=factors.B_MR.reshape(factors.B_MR.shape[0], -1, experts)[:, :, e],
                scaling=factors.scaling,
            )
            for factors in adapters
        ]
        merged[e] = merge_lora(weight[e], of_expert, transposed=transposed)
    return merged


@torch.no_grad()
def merge_lora_bias(bias_M: Tensor, updates: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The bias of a layer with those of its adapters: ``bias + sum scaling * update``, in float32."""
    merged_M = bias_M.to(torch.float64, copy=True)
    for update_M, scaling in updates:
        merged_M.add_(update_M.to(bias_M.device, torch.float64), alpha=scaling)
    return merged_M.float()


def _check(weight: Tensor, factors: LoraFactors, transposed: bool) -> None:
    shape_MN = (weight.shape[1], weight.shape[0]) if transposed else tuple(weight.shape)
    A, B, magnitude_M = factors.A_RN, factors.B_MR, factors.magnitude
    fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] and (B.shape[0], A.shape[1]) == shape_MN
    if not fits or (magnitude_M is not None and magnitude_M.shape != shape_MN[:1]):
        raise ValueError(
            "The adapter does not fit the weight: weight "
            f"{tuple(weight.shape)}{', stored as (in, out)' * transposed}, A {tuple(A.shape)}, B "
            f"{tuple(B.shape)}"
            + (f", magnitude {tuple(magnitude_M.shape)}" if magnitude_M is not None else "")
            + f". Expected B (M, R) and A (R, N) with (M, N) = {shape_MN}: was it trained on this model?"
        )
