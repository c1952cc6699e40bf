"""Least-squares correction of the readers of a narrowed residual stream.

Layer by layer, two copies of the calibration tokens are carried: through the dense model and
through the narrowed one, whose earlier layers are already corrected. At each norm, with u what the
narrowed norm delivers and v what the dense norm delivers,

    A = argmin |u A - v|^2 + lam |A - A0|^2,   A0 = Q' diag(w) / s,   lam = ridge * mean diag(u'u)

and every reader W of that norm becomes ``W A'``. A0 is what absorption used. No parameter is
added; one pass and one k x k solve per sublayer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize.absorb import is_tied
from dotresize.calibration import _StopForwardError
from dotresize.models import architecture_of

# Least squares in float64: the Gram matrix squares the condition number.
_SOLVE = torch.float64


class _LayerInputs:
    """Hidden states of all tokens before a layer, and the arguments its caller passes along.

    The arguments (positions, mask, rotary tables) are taken from the model's own forward pass
    and replayed layer by layer, so that no forward code is copied from any release.
    """

    def __init__(self, model: Any, layers: nn.ModuleList, tokens: Tensor, rows: int) -> None:
        self.hidden: list[Tensor] = []
        self.arguments: list[tuple[tuple, dict]] = []
        device = next(model.parameters()).device

        def catch(_: nn.Module, args: tuple, kwargs: dict) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            self.hidden.append(hidden)
            self.arguments.append((args[1:], kwargs))
            raise _StopForwardError

        handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for ids in tokens.split(rows):
                try:
                    model(input_ids=ids.to(device), use_cache=False)
                except _StopForwardError:
                    continue
        finally:
            handle.remove()

    def run(self, layer: nn.Module, i: int) -> Tensor:
        args, kwargs = self.arguments[i]
        out = layer(self.hidden[i], *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


def _delivered(inputs: _LayerInputs, layer: nn.Module, norm: nn.Module, i: int) -> Tensor:
    """What a norm inside the layer delivers for batch i; the rest of the layer is not run."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, output: Tensor) -> None:
        seen.append(output.flatten(0, -2))
        raise _StopForwardError

    handle = norm.register_forward_hook(keep)
    try:
        inputs.run(layer, i)
    except _StopForwardError:
        pass
    finally:
        handle.remove()
    return seen[0]


def _advance(inputs: _LayerInputs, layer: nn.Module, norms: list[nn.Module]) -> list[list[Tensor]]:
    """Run every batch through the layer; returns what each norm delivered, per batch."""
    delivered: list[list[Tensor]] = [[] for _ in norms]
    handles = [
        norm.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out.flatten(0, -2)))
        for norm, kept in zip(norms, delivered, strict=True)
    ]
    try:
        for i in range(len(inputs.hidden)):
            inputs.hidden[i] = inputs.run(layer, i)
    finally:
        for handle in handles:
            handle.remove()
    return delivered


class _Ridge:
    """Accumulates u'u and u'v, then solves for the map from u to v nearest to a prior."""

    def __init__(self, prior: Tensor) -> None:
        k = prior.shape[0]
        self.prior = prior
        self.gram = torch.zeros(k, k, dtype=_SOLVE, device=prior.device)
        self.cross = torch.zeros_like(prior, dtype=_SOLVE)

    def add(self, u: Tensor, v: Tensor) -> None:
        u, v = u.float(), v.float()
        self.gram += (u.mT @ u).to(_SOLVE)
        self.cross += (u.mT @ v).to(_SOLVE)

    def solve(self, ridge: float) -> Tensor:
        lam = ridge * self.gram.diagonal().mean()
        damped = self.gram + lam * torch.eye(len(self.gram), dtype=_SOLVE, device=lam.device)
        return torch.linalg.solve(damped, self.cross + lam * self.prior)


@torch.inference_mode()
def refit(
    dense: Any, narrow: Any, q: Tensor, tokens: Tensor, *, ridge: float, batch_windows: int = 4
) -> None:
    """Correct the readers of ``narrow`` in place; see the module's header.

    dense: the original model; narrow: ``absorb(dense, q)``; q: (D, k); tokens: int64
    (windows, length). A head of its own is a reader of the final norm and is corrected too; a tied
    head is not.
    """
    architecture = architecture_of(dense.config)
    dense_layers = dense.get_submodule(architecture.layers)
    narrow_layers = narrow.get_submodule(architecture.layers)
    wide_inputs = _LayerInputs(dense, dense_layers, tokens, batch_windows)
    inputs = _LayerInputs(narrow, narrow_layers, tokens, batch_windows)
    q = q.to(_SOLVE)
    s = (q.shape[1] / q.shape[0]) ** 0.5

    def correct(norm: nn.Module, ridge_problem: _Ridge, pairs: list) -> None:
        a = ridge_problem.solve(ridge)
        for wide_reader, reader in pairs:
            reader.weight.copy_((wide_reader.weight.to(_SOLVE) @ a.mT).to(reader.weight.dtype))

    layers = list(zip(dense_layers, narrow_layers, strict=True))
    for wide_layer, layer in tqdm(layers, desc="refit", unit="layer", disable=None):
        wide_norms = [wide_layer.get_submodule(part.norm) for part in architecture.sublayers]
        targets = _advance(wide_inputs, wide_layer, wide_norms)
        for part, wide_norm, wanted in zip(
            architecture.sublayers, wide_norms, targets, strict=True
        ):
            norm = layer.get_submodule(part.norm)
            problem = _Ridge(q.mT * wide_norm.weight.to(_SOLVE) / s)
            for i, v in enumerate(wanted):
                problem.add(_delivered(inputs, layer, norm, i), v)
            names = part.readers
            correct(
                norm,
                problem,
                [(wide_layer.get_submodule(n), layer.get_submodule(n)) for n in names],
            )
        _advance(inputs, layer, [])
    if not is_tied(narrow):
        wide_norm = dense.get_submodule(architecture.final_norm)
        norm = narrow.get_submodule(architecture.final_norm)
        problem = _Ridge(q.mT * wide_norm.weight.to(_SOLVE) / s)
        for x, y in zip(inputs.hidden, wide_inputs.hidden, strict=True):
            problem.add(norm(x).flatten(0, -2), wide_norm(y).flatten(0, -2))
        head = (dense.get_submodule(architecture.head), narrow.get_submodule(architecture.head))
        correct(norm, problem, [head])
