"""Ridge regression from normal equations.

    A = argmin sum_t |u_t A - v_t|^2 + sum_i lam_i |A_i - A0_i|^2

where A_i are the rows of A, one for each input. With g the diagonal of the Gram matrix sum u'u,
lam_i is ridge x mean(g), or ridge x g_i where the ridge is in proportion: then the sizes of the
inputs do not matter, and small ones are solved for like large ones.

Only the sums u'u and u'v are kept, so memory does not depend on the number of tokens.

The product of two numbers in half precision is exact in float32, so a GPU's matrix units, which
add up in float32, keep what float32 arithmetic would keep, up to how they round a sum (NVIDIA's cut
off where arithmetic rounds), at several times its rate. A float32 factor goes through them as three
bfloat16 numbers whose sum it is: x = h + m + l, each the rounding of what the ones before left, 3 x
8 bits of 24. Never TF32, which drops 13 bits of each factor. Elsewhere, and where neither factor is
in half precision, both are multiplied as float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from dotresize import distributed

# Normal equations square the condition number.
FLOAT = torch.float64
# In how many columns of blocks a Gram matrix is multiplied, and from which width on by matrix
# units, which like large products best.
GRAM_BLOCKS = 4
_WIDE_ON_GPU = 2048
# Tokens that ``NormalEquations.add_few`` waits for, and numbers in float64 that a cache holds.
FEW = 256
_CACHED = 2**15


class NormalEquations:
    """Sums over tokens: products of a chunk in float32, added up in float64."""

    def __init__(
        self, prior: Tensor, *, met_by_prior: bool = False, through: Tensor | None = None
    ) -> None:
        """Begin with no token.

        Args:
            prior: A0, (inputs, outputs) float64.
            met_by_prior: whether u A0 is what is to be met, and tokens are added without v.
            through: Q (width, outputs) float64, where v is x Q - y and tokens are added with x and
                y side by side, (..., width + outputs). What is summed over tokens is then u'x and
                u'y, and Q multiplies the sum: with x and y in half precision that is fewer
                products of matrix units than u'v with v in float32.
        """
        self.prior = prior
        self._through = through
        self.gram = prior.new_zeros(len(prior), len(prior))
        width = prior.shape[1] if through is None else prior.shape[1] + len(through)
        # Contiguous, as sums over processes must be.
        self.cross = prior.new_zeros(len(prior), width)
        self.squares = prior.new_zeros(())  # of what is to be met
        self._met_by_prior = met_by_prior
        self._tokens = prior.new_zeros(())
        self._few: dict[float, list[tuple[Tensor, Tensor | None]]] = {}  # by how often they count
        self._lam: Tensor | None = None  # what solving has added to the sums

    def add(self, u: Tensor, v: Tensor | None, weight: float = 1.0) -> None:
        """Add tokens: u (..., inputs), v (..., outputs), each of which counts ``weight`` times.

        v: None where u A0 is to be met.
        """
        u = u.flatten(0, -2)
        add_to(self.gram, gram(u), weight)
        self._tokens += weight * len(u)
        if v is None:
            return
        v = v.flatten(0, -2)
        add_to(self.cross, over_tokens(u, v), weight)
        self.squares += weight * self._wanted(v).square().sum(dtype=FLOAT)

    def add_few(self, u: Tensor, v: Tensor | None, weight: float) -> None:
        """Keep tokens until there are ``FEW``, then add them: one costs as much as many.

        Until ``total`` the sums may lack them.

        u: (tokens, inputs), v: (tokens, outputs) or None, as for all others.
        """
        kept = self._few.setdefault(weight, [])
        kept.append((u.clone(), None if v is None else v.clone()))
        if sum(len(one) for one, _ in kept) >= FEW:
            self._add_kept(weight)

    def _add_kept(self, weight: float) -> None:
        us, vs = zip(*self._few.pop(weight), strict=True)
        self.add(torch.cat(us), None if vs[0] is None else torch.cat(vs), weight)

    def _wanted(self, v: Tensor) -> Tensor:
        """Return what is to be met, float32."""
        if self._through is None:
            return v.float()
        x, y = v.split([len(self._through), self.prior.shape[1]], 1)
        return product(x, self._through.float()) - y.float()

    def total(self) -> None:
        """Add up the sums of all processes, once every token has been added."""
        for weight in [*self._few]:
            self._add_kept(weight)
        distributed.total(self.gram, self.cross, self.squares, self._tokens)
        if self._through is not None:
            x, y = self.cross.split([len(self._through), self.prior.shape[1]], 1)
            self.cross = torch.addmm(y, x, self._through, beta=-1)
        if self._met_by_prior:
            torch.matmul(self.gram, self.prior, out=self.cross)
            self.squares = (self.prior * self.cross).sum()

    @property
    def tokens_per_input(self) -> float:
        """How many tokens there are for each unknown of an output."""
        return float(self._tokens) / len(self.gram)

    def restrict(self, kept: Tensor, prior: Tensor) -> None:
        """Leave only some of the inputs, int64 (inputs,), with a prior of their own."""
        self.prior = prior
        self.gram = self.gram[kept][:, kept]
        self.cross = self.cross[kept]

    def solve(self, ridge: float, *, proportional: bool = False) -> Tensor:
        """Return A, (inputs, outputs); the sums are spent with it."""
        self._lam = _add_ridge(self.gram, self.cross, self.prior, ridge, proportional)
        return _solved(self.gram, self.cross)

    def lost(self, a: Tensor) -> float:
        """Return what u A misses, sum |u A - v|^2 / sum |v|^2.

        a: (inputs, outputs); once the sums are solved with, what they were solved for.
        """
        if self._lam is None:
            missed = self.squares + (a * (self.gram @ a - 2 * self.cross)).sum()
        else:  # (G + lam) A = C + lam A0, which is what cross holds
            drawn = (self._lam[:, None] * a * (2 * self.prior - a)).sum()
            missed = self.squares - (a * self.cross).sum() + drawn
        tiny = torch.finfo(FLOAT).tiny
        return float((missed / self.squares.clamp_min(tiny)).clamp_min(0.0))


def solve(
    gram: Tensor, cross: Tensor, prior: Tensor, ridge: float, *, proportional: bool = False
) -> Tensor:
    """Return A of the module's header from its sums.

    gram: (inputs, inputs); cross, prior: (inputs, outputs).

    gram and cross are overwritten: a copy is the largest thing there is in a narrow memory.
    """
    _add_ridge(gram, cross, prior, ridge, proportional)
    return _solved(gram, cross)


def _solved(gram: Tensor, cross: Tensor) -> Tensor:
    """Return the solution by Cholesky, half the work of LU, which is for what is not definite.

    Products in float32 leave a rank-deficient gram slightly indefinite, and a small ridge does not
    always cover that.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        del factor
        return torch.linalg.solve(gram, cross)
    # cholesky_solve would copy the factor.
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _add_ridge(
    gram: Tensor, cross: Tensor, prior: Tensor, ridge: float, proportional: bool
) -> Tensor:
    """Add lam, (inputs,), to the sums in place, and return it."""
    sizes = gram.diagonal().clone()
    sizes = sizes if proportional else sizes.mean().expand_as(sizes)
    # Inputs that are zero on every token leave the prior alone, whatever the ridge.
    lam = (ridge * sizes).clamp_min(torch.finfo(FLOAT).tiny)
    gram.diagonal().add_(lam)
    cross.add_(prior * lam[:, None])
    return lam


# The first devices whose matrix units take such factors.
_SINCE = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}


def add_to(total: Tensor, part: Tensor, weight: float = 1.0) -> None:
    """Add a part in float32, ``weight`` times, to sums in float64, both (n, m), in place.

    On a CPU torch would make a copy of the part in float64, which takes twice as long as
    the sum; so that is done for few rows at a time.
    """
    if total.is_cuda:
        total.add_(part, alpha=weight)
        return
    rows = max(1, _CACHED // max(1, part.shape[1]))
    for some, mine in zip(total.split(rows), part.split(rows), strict=True):
        some.add_(mine.to(total.dtype), alpha=weight)


def over_tokens(u: Tensor, v: Tensor) -> Tensor:
    """Return u'v, float32: u (T, n), v (T, m), of any floating type."""
    return product(u.mT, v)


def gram(u: Tensor) -> Tensor:
    """Return u'u, float32: u (T, n) of any floating type."""
    u = u if has_matrix_units(u) else u.float()
    return _symmetric(u, [u])


def scaled_gram(x: Tensor, scale: Tensor, scaled: Tensor) -> Tensor:
    """Return (s x)'(s x), float32: x (T, n) of any floating type, s (T, 1) and s x float32."""
    if has_matrix_units(x) and x.dtype == torch.bfloat16:
        return _symmetric(x, split_in_three(scaled * scale))
    return gram(scaled)


def _symmetric(u: Tensor, parts: list[Tensor]) -> Tensor:
    """Return u'v of v the sum of the parts, where that is symmetric: float32, to the last bit.

    Only blocks on and above the diagonal are multiplied, 5/8 of all.
    """
    width = u.shape[-1]
    count = GRAM_BLOCKS if width >= (_WIDE_ON_GPU if u.is_cuda else GRAM_BLOCKS**2) else 1
    found = u.new_empty(width, width, dtype=torch.float32)
    edges = [width * i // count for i in range(count + 1)]
    for begin, end in itertools.pairwise(edges):
        rows = u[:, begin:end].mT
        terms = (_multiply(rows, part[:, begin:]) for part in reversed(parts))
        found[begin:end, begin:] = _sum(terms)
        within = found[begin:end, begin:end]
        within.copy_((within + within.mT) / 2)
        found[end:, begin:end] = found[begin:end, end:].mT
    return found


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, float32: (n, T), (T, m), of any floating type."""
    if has_matrix_units(a) and a.dtype == b.dtype:
        return _multiply(a, b)
    if has_matrix_units(a) and a.dtype == torch.bfloat16:
        return _sum(_multiply(a, part) for part in reversed(split_in_three(b.float())))
    if has_matrix_units(b) and b.dtype == torch.bfloat16:
        return _sum(_multiply(part, b) for part in reversed(split_in_three(a.float())))
    return a.float() @ b.float()


def has_matrix_units(x: Tensor) -> bool:
    """Return whether the device has matrix units for such a factor that add up in float32."""
    if not x.is_cuda or torch.version.hip or x.dtype not in _SINCE:
        return False
    return torch.cuda.get_device_capability(x.device) >= _SINCE[x.dtype]


def split_in_three(x: Tensor) -> list[Tensor]:
    """Return three bfloat16 tensors whose exact sum is a float32 one.

    That holds for 2^-110 < |x| < 2^127, and for 0.
    """
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return parts


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, float32, of two factors of one type, added up in float32."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    """Return the sum of terms that are made one after the other, so that two are held at most."""
    total = next(terms)
    for term in terms:
        total += term
    return total
