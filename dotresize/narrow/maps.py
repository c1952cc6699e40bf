"""Width maps, and what is asked of their bases.

Row convention: hidden states are ``(tokens, D)``; a basis Q is ``(D, k)`` and narrows by ``X Q``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def align(q: Tensor, selection: Tensor) -> Tensor:
    """Return the basis of span(q) nearest to the plain selection of k axes (orthogonal Procrustes).

    ``q polar(q[selection]^T)``: the same span, so the same function of an untied model, but as
    axis-aligned as the span allows. q: (D, k) orthonormal; selection: int64 (k,) -> (D, k).
    """
    u, _, vh = torch.linalg.svd(q[selection].mT)
    return q @ (u @ vh)


def level(q: Tensor) -> Tensor:
    """Return the basis nearest to q that keeps the mean of the channels: Q 1 = sqrt(k/D) 1.

    LayerNorm takes off the mean over its width. With c the unit vector along (1, ..., 1), c is
    taken into the span for the direction that is least of the rest, and the basis is turned in one
    plane until c is its own (1, ..., 1) / sqrt(k). q: (D, k) orthonormal -> (D, k) orthonormal.
    """
    width, k = q.shape
    c = q.new_full((width, 1), width**-0.5)
    rest = torch.linalg.svd(q - c @ (c.mT @ q), full_matrices=False).U[:, : k - 1]
    span = torch.cat([c, rest], 1)
    u, _, vh = torch.linalg.svd(span.mT @ q)
    near = span @ (u @ vh)
    here, there = near.mT @ c, q.new_full((k, 1), k**-0.5)
    turn = here @ there.mT - there @ here.mT
    cosine = float((here.mT @ there).squeeze())
    if cosine < -0.99:  # half a turn has no plane; any sign of the basis is as good
        near, here = -near, -here
        turn, cosine = -turn, -cosine
    return near @ (torch.eye(k, dtype=q.dtype, device=q.device) + turn + turn @ turn / (1 + cosine))


def is_identity(q: Tensor) -> bool:
    """Return whether a basis leaves all channels as they are."""
    width, k = q.shape
    return width == k and torch.equal(q, torch.eye(k, dtype=q.dtype, device=q.device))


@dataclass
class WidthMap:
    """A narrowing of the residual stream, however it was found.

    Attributes:
        q: (D, k) float64, orthonormal columns.
        selection: int64 (k,), the old neuron that each new one stands for, ascending.
        details: figures for the report.
        seconds: time per stage.
        spectrum: (D,) eigenvalues of the transport plan whose leading eigenvectors q is, from the
            largest on; None for other maps.
    """

    q: Tensor
    selection: Tensor
    details: dict[str, object] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    spectrum: Tensor | None = None

    @classmethod
    def identity(cls, width: int, device: torch.device) -> WidthMap:
        """Return the map that leaves everything as it is."""
        kept = torch.arange(width, dtype=torch.int64, device=device)
        return cls(torch.eye(width, dtype=torch.float64, device=device), kept)

    @classmethod
    def none(cls) -> WidthMap:
        """Return the map of a model whose residual width stays."""
        return cls(
            torch.empty((0, 0), dtype=torch.float64, device="cpu"),
            torch.empty(0, dtype=torch.int64, device="cpu"),
        )


def largest(importance: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest entries, ascending. importance: (D,) -> int64 (k,)."""
    return importance.topk(k).indices.sort().values


def figures_of(qs: list[Tensor], moment: Tensor, width_map: WidthMap) -> dict[str, object]:
    """Return what a page shows of a map: the variance it loses, spectra, the map itself.

    qs: (D, k) orthonormal for each location; moment: (L, D, D) second moments of the locations.
    """
    kept = [float(((m @ q) * q).sum() / m.trace()) for m, q in zip(moment, qs, strict=True)]
    spectra = {"variance": beyond(torch.linalg.eigvalsh(moment.mean(0)).clamp_min(0).flip(0))}
    if width_map.spectrum is not None and all(q is qs[0] for q in qs):
        # The first is the constant direction, which dwarfs the others and tells no neurons apart.
        spectra["transport plan"] = [1.0, *beyond(width_map.spectrum[1:])]
    return {
        "lost": [max(0.0, 1 - share) for share in kept],
        "spectra": spectra,
        "width": qs[0].shape[1],
        "map": qs[0].abs().tolist(),
        "details": width_map.details,
    }


def beyond(spectrum: Tensor) -> list[float]:
    """Return the share of eigenvalues that lies beyond the first, the first two, ..."""
    return (1 - spectrum.cumsum(0) / spectrum.sum()).clamp_min(0).tolist()
