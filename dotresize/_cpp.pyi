# The compiled CPU kernels (csrc/module.cpp). Addresses are Tensor.data_ptr(); callers own the
# tensors and have checked them.
OPENMP: bool
TOKEN_BLOCK: int

def simd_level() -> str: ...

class Activations:
    def __init__(
        self,
        data: int,
        dtype: int,
        batch_stride: int,
        token_stride: int,
        count: int,
        index: int,
    ) -> None: ...

def l1_cost(
    batch: int,
    tokens: int,
    x: Activations,
    y: Activations,
    out: int,
    mirrored: int,
    accumulate: bool,
    scale: float,
    num_threads: int,
) -> None: ...

class SinkhornProblems:
    def __init__(
        self,
        batch: int,
        n: int,
        m: int,
        cost: int,
        reg: int,
        a: int,
        b: int,
        f: int,
        g: int,
        n_iter: int,
        marginal_error: int,
        status: int,
    ) -> None: ...

def sinkhorn(
    problems: SinkhornProblems, use_float64: bool, max_iter: int, tol: float, num_threads: int
) -> None: ...
