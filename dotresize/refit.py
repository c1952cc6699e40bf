"""Least-squares correction of a narrowed model, layer by layer, on the calibration tokens.

Two copies of the tokens are carried: through the dense model and through the narrowed one, whose
earlier layers are already corrected. With s = sqrt(k / D), at each sublayer in order:

readers   u is what the narrowed norm delivers, v what the dense norm delivers;
          A = argmin |u A - v|^2 + lam |A - A0|^2,   A0 = Q' diag(w) / s (what absorption used),
          and every dense reader W becomes W A'.
writer    h is what the narrowed writer reads, x the narrowed stream before it, x_d the dense
          stream after it;
          B = argmin |h B + x - s x_d Q|^2 + lam |B - B0|^2,   B0 what absorption left,
          and the writer becomes B'. It steers the stream back to the projected dense one, which
          is all that a tied head, not to be corrected itself, can understand.

lam is ridge times the mean diagonal of the Gram matrix. No parameter is added; the cost is a pass
over the tokens and two small solves per sublayer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dotresize.absorb import is_tied
from dotresize.calibration import StopForward
from dotresize.models import Sublayer, architecture_of

# Normal equations square the condition number.
_SOLVE = torch.float64


@torch.inference_mode()
def refit(
    dense: Any, narrow: Any, q: Tensor, tokens: Tensor, *, ridge: float, batch_windows: int = 4
) -> None:
    """Correct ``narrow`` in place; see the module's header.

    dense: the original model; narrow: ``absorb(dense, q)``; q: (D, k) orthonormal; tokens: int64
    (windows, length). A head of its own is a reader of the final norm and is corrected as such; a
    tied one is not.
    """
    architecture = architecture_of(dense.config)
    dense_layers = dense.get_submodule(architecture.layers)
    narrow_layers = narrow.get_submodule(architecture.layers)
    wide = _Batches(dense, dense_layers, tokens, batch_windows)
    thin = _Batches(narrow, narrow_layers, tokens, batch_windows)
    basis = _Basis(q)
    layers = list(zip(dense_layers, narrow_layers, strict=True))
    for dense_layer, layer in tqdm(layers, desc="refit", unit="layer", disable=None):
        wanted = _run_dense(wide, dense_layer, architecture.sublayers)
        stream = thin.stream
        for part, (delivered, after) in zip(architecture.sublayers, wanted, strict=True):
            readers = [(dense_layer.get_submodule(r), layer.get_submodule(r)) for r in part.readers]
            norm = layer.get_submodule(part.norm)
            prior = basis.reader_prior(dense_layer.get_submodule(part.norm))
            _correct_readers([norm(x) for x in stream], delivered, prior, readers, ridge)
            writer = layer.get_submodule(part.writer)
            read = [thin.input_of(layer, writer, i) for i in range(len(stream))]
            _correct_writer(read, stream, [basis.project(x) for x in after], writer, ridge)
            stream = [x + writer(h) for x, h in zip(stream, read, strict=True)]
        thin.stream = stream
    if not is_tied(narrow):
        dense_norm = dense.get_submodule(architecture.final_norm)
        norm = narrow.get_submodule(architecture.final_norm)
        head = (dense.get_submodule(architecture.head), narrow.get_submodule(architecture.head))
        _correct_readers(
            [norm(x) for x in thin.stream],
            [dense_norm(x) for x in wide.stream],
            basis.reader_prior(dense_norm),
            [head],
            ridge,
        )


class _Basis:
    """The width map, in the two forms that the solves need."""

    def __init__(self, q: Tensor) -> None:
        self._q = q.to(_SOLVE)
        self._scale = (q.shape[1] / q.shape[0]) ** 0.5

    def reader_prior(self, norm: nn.Module) -> Tensor:
        """A0, (k, D): from the narrowed norm's output to the dense norm's."""
        return self._q.mT * norm.weight.to(_SOLVE) / self._scale  # type: ignore[operator]

    def project(self, x: Tensor) -> Tensor:
        """s x Q: where the narrowed stream should be when the dense one is at x."""
        return x.float() @ (self._scale * self._q).float()


class _Batches:
    """The residual stream of all tokens in front of a layer, and what its caller passes along.

    The arguments (positions, masks, rotary tables) are those that the model's own forward pass
    gives to each of its layers; they are replayed, so that no forward code is copied from any
    release, and layers with masks of their own (sliding windows) get them.
    """

    def __init__(self, model: Any, layers: nn.ModuleList, tokens: Tensor, rows: int) -> None:
        self.stream: list[Tensor] = []
        self._arguments: dict[nn.Module, list[tuple[tuple, dict]]] = {layer: [] for layer in layers}
        device = next(model.parameters()).device
        first, last = layers[0], layers[-1]

        def catcher(layer: nn.Module) -> Callable:
            def catch(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                self._arguments[layer].append((args, kwargs))
                if layer is first:
                    self.stream.append(hidden_states)
                if layer is last:
                    raise StopForward
                return hidden_states

            return catch

        for layer in layers:
            layer.forward = catcher(layer)  # an attribute of the instance, in front of the method
        try:
            for ids in tokens.split(rows):
                try:
                    model(input_ids=ids.to(device), use_cache=False)
                except StopForward:
                    continue
        finally:
            for layer in layers:
                del layer.forward

    def run(self, layer: nn.Module, i: int) -> Tensor:
        """The layer's output for batch i."""
        args, kwargs = self._arguments[layer][i]
        out = layer(self.stream[i], *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def input_of(self, layer: nn.Module, module: nn.Module, i: int) -> Tensor:
        """What a module inside the layer reads for batch i; nothing after it is run."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple) -> None:
            seen.append(args[0])
            raise StopForward

        handle = module.register_forward_pre_hook(keep)
        try:
            self.run(layer, i)
        except StopForward:
            pass
        finally:
            handle.remove()
        return seen[0]


def _run_dense(
    wide: _Batches, layer: nn.Module, sublayers: tuple[Sublayer, ...]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Move the dense stream past a layer.

    Returns, per sublayer and batch, what its norm delivered and the stream after its writer, which
    is what the next norm reads, or the layer's output.
    """
    read: list[list[Tensor]] = [[] for _ in sublayers]
    delivered: list[list[Tensor]] = [[] for _ in sublayers]

    def keeper(i: int) -> Callable:
        def keep(_: nn.Module, args: tuple, output: Tensor) -> None:
            read[i].append(args[0])
            delivered[i].append(output)

        return keep

    handles = [
        layer.get_submodule(part.norm).register_forward_hook(keeper(i))
        for i, part in enumerate(sublayers)
    ]
    try:
        wide.stream = [wide.run(layer, i) for i in range(len(wide.stream))]
    finally:
        for handle in handles:
            handle.remove()
    return list(zip(delivered, [*read[1:], wide.stream], strict=True))


def _correct_readers(
    u: list[Tensor], v: list[Tensor], prior: Tensor, readers: list, ridge: float
) -> None:
    a = _ridge_solve(u, v, prior, ridge)
    for dense_reader, reader in readers:
        weight = dense_reader.weight.to(_SOLVE) @ a.mT
        reader.weight.copy_(weight.to(reader.weight.dtype))


def _correct_writer(
    h: list[Tensor], stream: list[Tensor], wanted: list[Tensor], writer: Any, ridge: float
) -> None:
    bias = 0.0 if writer.bias is None else writer.bias.float()
    missing = [goal - x.float() - bias for goal, x in zip(wanted, stream, strict=True)]
    b = _ridge_solve(h, missing, writer.weight.to(_SOLVE).mT, ridge)
    writer.weight.copy_(b.mT.to(writer.weight.dtype))


def _ridge_solve(u: list[Tensor], v: list[Tensor], prior: Tensor, ridge: float) -> Tensor:
    """argmin_A sum |u A - v|^2 + lam |A - prior|^2, the sums over batches in float64."""
    gram = torch.zeros(len(prior), len(prior), dtype=_SOLVE, device=prior.device)
    cross = torch.zeros_like(prior)
    for x, y in zip(u, v, strict=True):
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        gram += (x.mT @ x).to(_SOLVE)
        cross += (x.mT @ y).to(_SOLVE)
    lam = ridge * gram.diagonal().mean()
    gram.diagonal().add_(lam)
    return torch.linalg.solve(gram, cross + lam * prior)
