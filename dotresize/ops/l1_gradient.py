r"""The gradient of the L1 cost by its activations, on every backend.

.. math:: \frac{\partial L}{\partial x_{ti}} = \frac{1}{T} \sum_j G_{ij} \, s_{tij}, \quad
          \frac{\partial L}{\partial y_{tj}} = -\frac{1}{T} \sum_i G_{ij} \, s_{tij}, \quad
          s_{tij} = \mathrm{sign}(x_{ti} - y_{tj})

with G the gradient that arrives at the cost. Equal activations have the subgradient 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dotresize.ops import reference
from dotresize.ops.arguments import address
from dotresize.ops.backends import choose, cpp, threads
from dotresize.ops.constants import L1Gradients
from dotresize.ops.l1_launch import operand, readable, targets_first


def with_gradient(
    cost: Tensor, x: Tensor, y: Tensor | None, index: Tensor | None, divisor: float, backend: str
) -> Tensor:
    """Return a computed cost so that gradients pass from it to x and y, as the caller gave them."""
    return _L1Cost.apply(x, y, index, _Computed([cost], divisor, backend))


class _Computed:
    """A cost, in a list until it is handed out, and how it was computed.

    Kept here it would refer to itself through its graph, and stay until garbage is collected; as an
    argument autograd would take it for an input.
    """

    def __init__(self, cost: list[Tensor], divisor: float, backend: str) -> None:
        self.cost, self.divisor, self.backend = cost, divisor, backend


class _L1Cost(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, index: Tensor | None, computed: _Computed
    ) -> Tensor:
        ctx.computed = computed
        ctx.save_for_backward(x, y, index)  # torch then refuses what was changed in between
        return computed.cost.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x, y, index), computed = ctx.saved_tensors, ctx.computed
        work = L1Gradients(
            x=_batched(x),
            y=None if y is None else _batched(y),
            targets=index,
            gradient=_batched(incoming),
            divisor=computed.divisor,
        )
        by_x, by_y = _launch(
            work, ctx.needs_input_grad[0], ctx.needs_input_grad[1], computed.backend
        )
        return (
            None if by_x is None else by_x.view(x.shape).to(x.dtype),
            None if by_y is None else by_y.view(y.shape).to(y.dtype),
            None,
            None,
        )


def _batched(value: Tensor) -> Tensor:
    return (value if value.dim() == 3 else value[None]).detach().resolve_neg()


def _launch(
    work: L1Gradients, by_x: bool, by_y: bool, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return the wanted gradients in float32; without y, that by x holds both its roles."""
    if work.x.numel() == 0 or work.gradient.numel() == 0:
        wanted = (work.x if by_x else None, work.y if by_y else None)
        by_x_0, by_y_0 = (v if v is None else torch.zeros_like(v).float() for v in wanted)
        return by_x_0, by_y_0
    if work.y is not None and not by_x:
        # The roles are symmetric: |y - x| = |x - y|.
        swapped = work._replace(x=work.y, y=work.x, gradient=work.gradient.mT)
        return None, _launch(swapped, True, False, backend)[0]
    chosen = choose(backend, work.x.device)
    if chosen == "cpp":
        return _launch_cpp(work, by_y)
    if chosen == "triton":
        from dotresize.kernels import l1_backward as kernel

        return kernel.l1_backward(work, by_y)
    return _launch_torch(work, by_y)


def _launch_torch(work: L1Gradients, by_y: bool) -> tuple[Tensor, Tensor | None]:
    x, index = work.x.float(), work.targets
    y = work.columns().float()
    gradient = work.gradient / work.divisor
    found_x, found_y = reference.l1_cost_backward(x, y, gradient)
    if work.y is not None:
        return found_x, found_y if by_y else None
    if index is None:
        return found_x + found_y, None
    return found_x.scatter_add(2, work.index_of_tokens(), found_y), None


def _launch_cpp(work: L1Gradients, by_y: bool) -> tuple[Tensor, Tensor | None]:
    x, y, index = readable(work.x), readable(work.y), work.targets
    gradient = work.gradient.contiguous()
    found_x = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    found_y = None
    order, mirrored = None, 0
    if y is not None:
        if by_y:
            found_y = torch.empty(y.shape, dtype=torch.float32, device="cpu")
    elif index is None:
        mirrored = x.shape[2]
        gradient = gradient + gradient.mT
    else:
        order, mirrored = targets_first(index, x.shape[2])
        if order is not None:
            gradient = gradient.gather(1, order[:, :, None].expand(gradient.shape))
            gradient[:, :mirrored] += gradient[:, :mirrored].mT.clone()
    cpp().l1_backward(
        batch=x.shape[0],
        rows=x.shape[1],
        x=operand(x, order),
        y=operand(x if y is None else y, index),
        gradient=address(gradient, torch.float32),
        grad_x=address(found_x, torch.float32),
        grad_y=address(found_x if y is None else found_y, torch.float32),
        mirrored=mirrored,
        scale=work.divisor,
        num_threads=threads(),
    )
    return found_x, found_y
