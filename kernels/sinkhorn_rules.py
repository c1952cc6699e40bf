"""What the programs of a Sinkhorn problem decide alike, each by itself, from the same numbers.

Both ways to solve on a GPU use these: sinkhorn_swept.py, which launches every iteration, and
resident.py, which stays on the device.

**The kept plan.** Potentials settle long before they converge. A KEEPING sweep reads the cost, as
an EXACT one does, and stores the rows that it made,

    E_ij = fp16(2^14 P_ij / a_i)     with P of this sweep's f and g, the reference,

and while g stays near that reference, CHEAP sweeps read E alone and scale its columns by
v_j = 2^(g_j - reference_j):

    s_i = rho_i sum_j E_ij v_j,      c_j = gamma_j v_j sum_i (a_i / s_i) E_ij.

rho and gamma are the sums of the exact rows and columns over those of the rounded ones: without
them the rounding, 2^-12 an entry, leaves a marginal error of 1e-5 that no iteration takes away.
Launched, the first cheap sweep finds them, as there is no room for two sums of every column in a
sweep with exponentials; resident, the keeping sweep does, from shared memory.
As they do not keep the mass to second order, the columns are compared with b after a division by
their own total. The last sweep is always exact, so that the potentials and the error that are
returned are those of the cost.

This is the scaling form with absorption that csrc/sinkhorn_rows.hpp uses (Schmitzer, SIAM J. Sci.
Comput. 41, 2019); 16 bits and their correction are new here. Figures: docs/studies.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dotresize.ops import constants

EXACT, KEEPING, CHEAP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# What 1 is in E: entries above 2^-28 of their row keep all digits, above 2^-38 some.
KEPT_ONE = tl.constexpr(2.0**14)
# Powers of two that a column may move from its reference: on real costs, 12 takes a fifth fewer
# sweeps of the cost than 8, and as many iterations.
DRIFT = tl.constexpr(12.0)
# E represents a column of at least this share of all mass: an entry is off by 2^-12 of itself or by
# 2^-39 of its row, so that a column's sum is off by an eighth of this at most.
LOST = tl.constexpr(2.0**-36)
# Sweeps that one reference serves at most, so that what rounding is left does not stay.
SERVES = tl.constexpr(32)
# An exact sweep is due where a cheap one is so near the tolerance.
NEAR = tl.constexpr(0.7)
FAST_ENOUGH = tl.constexpr(constants.FAST_ENOUGH)


@triton.jit
def next_sweep(error, last_error, drift, fits, since, iteration, max_iter, tol, KEEP: tl.constexpr):
    """Return how the next sweep is done, by what the last one left.

    error, last_error: of the last two sweeps. drift: the largest |g - reference|, in powers of two,
    where an exact sweep is its own reference. fits: whether 16 bits represent every column of the
    last exact sweep. since: sweeps after the one that stored E, -1 without one. iteration: the
    number of the next sweep.
    """
    sweep = EXACT
    if KEEP:
        near = (since > 0) & (error <= tol * NEAR)
        goes_on = (iteration < max_iter) & (drift <= DRIFT) & (fits > 0) & ~near
        cheap = goes_on & (since >= 0) & (since < SERVES)
        # What three more sweeps will end is not worth storing; of the first, nothing is known.
        rate = error / last_error
        keeping = goes_on & ~(error * rate * rate * rate <= tol)
        sweep = tl.where(cheap, CHEAP, tl.where(keeping, KEEPING, EXACT))
    return sweep


@triton.jit
def has_converged(error, since, tol):
    """Return whether the last sweep was an exact one that met the tolerance; never by NaN."""
    return (since <= 0) & (tol > 0) & (error <= tol)


@triton.jit
def momentum_age(age, against, error, last_error, largest, FAR: tl.constexpr):
    """Return for how many iterations momentum has grown, this one included.

    By the numbers of the last two iterations; see dotresize.ops.acceleration.Momentum.
    """
    again = (against < 0) | (error < last_error * FAST_ENOUGH) | (largest > FAR)
    return tl.where(again, 0.0, age) + 1
