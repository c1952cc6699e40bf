"""MoDeGPT: three decompositions of a layer's pairs of matrices (Lin et al., arXiv 2408.09632).

With C = x'x of what the attention reads and G = h'h of the inner activations h:

feed-forward    Nystrom: the neurons of largest ridge leverage ``[G (G + lam)^-1]_ii`` stay, and the
                down projection becomes ``(G_SS)^-1 G_S W``
query, key      CR: of every head the rows stay whose ``|C^1/2 q_i| |C^1/2 k_i|`` is largest; two
                that a rotation mixes go together, and query heads that share a key share the choice
value, output   SVD: the rank of ``C^1/2 V O`` is cut, for each value head with all that share it

A layer gets more of the cut the less it changes its stream: the share ``N s softmax(-BI / eps)``,
BI as in blocks.py. The feed-forward takes what rounding leaves. Where queries and keys are
normalised after their projections (Gemma 3, Qwen3), their rows stay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dotresize.least_squares import gram
from dotresize.models.causal_lm import CausalLM

from .blocks import block_influence
from .layers import Layer, Pruned, layers_of, to_remove, watched

# What the paper leaves open, or was not read in it, was chosen once, before anything was measured:
EPSILON = 0.1
MOST = 0.8  # of a layer: at so much the allocation is cut off, and others take the rest
RIDGE = 1e-2  # of the leverage, in units of the mean diagonal of G
FLOOR = 1e-6  # added to Gram matrices before they are inverted, in the same units


def prune(model: CausalLM, tokens: Tensor, share: float) -> Pruned:
    """Return the model with all three decompositions, at full width, with zeros."""
    new = model.copied()
    wanted = to_remove(model, share)
    total = sum(layer.of_attention + layer.of_feed_forward for layer in layers_of(new))
    parts = allocation(block_influence(model, tokens), wanted / total)
    return _decomposed(new, tokens, parts.tolist(), attention=True)


def prune_feed_forwards(model: CausalLM, tokens: Tensor, share: float) -> Pruned:
    """Return the model with feed-forwards of one smaller width, and nothing else cut."""
    new = model.copied()
    layers = layers_of(new)
    part = to_remove(model, share) / len(layers) / layers[0].of_feed_forward
    return _decomposed(new, tokens, [part] * len(layers), attention=False)


def allocation(influence: Tensor, sparsity: float) -> Tensor:
    """Return the share of every layer that goes, their mean being ``sparsity``."""
    weights = (-influence / EPSILON).softmax(0)
    found = torch.zeros_like(weights)
    free = torch.ones_like(weights, dtype=torch.bool)
    left = sparsity * len(weights)
    while free.any():
        found[free] = left * weights[free] / weights[free].sum()
        over = free & (found > MOST)
        if not over.any():
            break
        found[over] = MOST
        left -= MOST * int(over.sum())
        free &= ~over
    return found


def _decomposed(model: CausalLM, tokens: Tensor, parts: list[float], *, attention: bool) -> Pruned:
    layers = layers_of(model)
    if attention and any(one.bias is not None for layer in layers for one in (layer.q, layer.v)):
        raise ValueError("MoDeGPT: queries or values have biases, which this does not decompose")
    inner = [torch.zeros((), dtype=torch.float64)] * len(layers)
    read = [torch.zeros((), dtype=torch.float64)] * len(layers)
    for number, (x, h, _) in watched(model, tokens, lambda one: [one.q, one.down]):
        inner[number] = inner[number] + gram(h.flatten(0, -2)).double()
        if attention:
            read[number] = read[number] + gram(x.flatten(0, -2)).double()
    removed, chosen = 0, []
    for layer, part, of_inner, of_read in zip(layers, parts, inner, read, strict=True):
        cut = 0
        rows = rank = layer.size
        if attention:
            rank = round((1 - part) * layer.size)
            cut += cut_values(layer, _regular(of_read), rank)
            if not hasattr(layer.module.self_attn, "q_norm"):
                rows = 2 * round((1 - part) * layer.size / 2)
                cut += cut_queries(layer, _regular(of_read), rows)
        whole = layer.of_feed_forward + attention * layer.of_attention
        width = layer.inner - round((part * whole - cut) / layer.of_neuron)
        if not 0 < width <= layer.inner:
            raise ValueError(
                f"MoDeGPT: a feed-forward of {layer.inner} neurons cannot keep {width}"
            )
        removed += cut + nystrom(layer, of_inner, width)
        chosen.append([rows, rank, width])
    return Pruned(model, removed, {"rows_rank_width": chosen})


@torch.no_grad()
def nystrom(layer: Layer, inner: Tensor, width: int) -> int:
    """Keep so many neurons, which write what comes nearest to what all wrote."""
    lam = RIDGE * inner.diagonal().mean()
    regular = inner + lam * torch.eye(len(inner), dtype=inner.dtype)
    leverage = torch.linalg.solve(regular, inner).diagonal()
    kept = leverage.topk(width).indices.sort().values
    within = _regular(inner[kept][:, kept])
    rows = torch.linalg.solve(within, inner[kept] @ layer.down.weight.double().mT)
    gone = torch.ones(layer.inner, dtype=torch.bool)
    gone[kept] = False
    layer.down.weight[:, kept] = rows.mT.to(layer.down.weight.dtype)
    return layer.remove_neurons(gone)


@torch.no_grad()
def cut_queries(layer: Layer, read: Tensor, rows: int) -> int:
    """Keep so many rows of every query and key head."""
    lower = torch.linalg.cholesky(read)

    def norms(linear: nn.Linear) -> Tensor:
        """Return |C^1/2 w|^2 of each row, by group, head and the two halves of a rotation."""
        found = (linear.weight.double() @ lower).square().sum(1)
        return found.view(layer.groups, -1, 2, layer.size // 2)

    score = norms(layer.q).sum((1, 2)) * norms(layer.k).sum((1, 2))
    kept = score.topk(rows // 2, dim=1).indices
    gone = torch.ones(layer.groups, layer.size // 2, dtype=torch.bool).scatter_(1, kept, False)
    for linear in (layer.q, layer.k):
        heads = len(linear.weight) // layer.size // layer.groups
        mask = gone[:, None, None].expand(-1, heads, 2, -1).reshape(-1)
        linear.weight[mask] = 0
    gone_rows = layer.size - rows
    return gone_rows * (layer.heads + layer.groups) * layer.q.weight.shape[1]


@torch.no_grad()
def cut_values(layer: Layer, read: Tensor, rank: int) -> int:
    """Cut the rank of every value head times the output projections of the heads that share it."""
    shared = layer.heads // layer.groups
    values = layer.v.weight.double().view(layer.groups, layer.size, -1)
    outputs = layer.o.weight.double().mT.reshape(layer.groups, shared, layer.size, -1)
    for group, (value, output) in enumerate(zip(values, outputs, strict=True)):
        # C^1/2 V = Q_v R_v and O = R_o' Q_o', so the small R_v R_o' has their singular values.
        side_by_side = output.transpose(0, 1).reshape(layer.size, -1)
        r_v = torch.linalg.cholesky(_regular(value @ read @ value.mT)).mT
        r_o = torch.linalg.cholesky(_regular(side_by_side @ side_by_side.mT)).mT
        u, s, v = torch.linalg.svd(r_v @ r_o.mT)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        new_value = torch.linalg.solve_triangular(r_v, u, upper=True).mT @ value
        new_output = (
            s[:, None] * v @ torch.linalg.solve_triangular(r_o.mT, side_by_side, upper=False)
        )
        new_output = new_output.view(rank, shared, -1).transpose(0, 1)
        values[group] = 0
        values[group, :rank] = new_value
        outputs[group] = 0
        outputs[group, :, :rank] = new_output
    layer.v.weight.copy_(values.view_as(layer.v.weight))
    layer.o.weight.copy_(outputs.reshape(-1, layer.o.weight.shape[0]).mT)
    inputs, written = layer.v.weight.shape[1], layer.o.weight.shape[0]
    return (layer.size - rank) * (layer.groups * inputs + layer.heads * written)


def _regular(matrix: Tensor) -> Tensor:
    """Return a Gram matrix that has an inverse."""
    floor = FLOOR * matrix.diagonal().mean()
    return matrix + floor * torch.eye(len(matrix), dtype=matrix.dtype)
