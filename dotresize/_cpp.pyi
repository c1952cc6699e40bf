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
    rows: int,
    x: Activations,
    y: Activations,
    out: int,
    mirrored: int,
    accumulate: bool,
    scale: float,
    steps: int,
    num_threads: int,
) -> None: ...
def l1_backward(
    batch: int,
    rows: int,
    x: Activations,
    y: Activations,
    gradient: int,
    grad_x: int,
    grad_y: int,
    mirrored: int,
    scale: float,
    num_threads: int,
) -> None: ...
def l1_tile_alone(pairs: int, num_threads: int) -> int: ...
def quantize(
    batch: int,
    x: Activations,
    tokens: int,
    token: int,
    low: int,
    dither: int,
    steps: int,
    out: int,
    num_threads: int,
) -> None: ...
def sinkhorn(
    batch: int,
    table: int,
    reg: int,
    tol: int,
    momentum: int,
    a: int,
    b: int,
    f: int,
    g: int,
    n_iter: int,
    marginal_error: int,
    status: int,
    use_float64: bool,
    max_iter: int,
    num_threads: int,
) -> None: ...
def plan(
    n: int,
    m: int,
    cost: int,
    stride: int,
    reg: float,
    f: int,
    g: int,
    out: int,
    use_float64: bool,
    num_threads: int,
) -> None: ...
def assignment(
    batch: int,
    n: int,
    score: int,
    batch_stride: int,
    row_stride: int,
    sign: float,
    start: int,
    columns: int,
    v: int,
    status: int,
    use_float64: bool,
    num_threads: int,
) -> None: ...
