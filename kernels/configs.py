"""Launch configurations: fixed tables, so that nothing is tuned inside a training step.

The gemms' tiles were chosen by reasoning, not by measurement: they fill the multiprocessors at a few thousand rows,
with three stages in shared memory (`python -m sgmim_fast.kernels.compile` prints what they occupy).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple


class Config(NamedTuple):
    """The configuration of a gemm's launch."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# (bytes per element of the operands, shape class) -> configuration, unless `sgmim_fast.tune` has measured another one
PRODUCTS = {
    (2, "large"): Config(128, 128, 64, 8, 3),
    (2, "medium"): Config(64, 128, 64, 4, 3),
    (2, "small"): Config(32, 64, 32, 4, 3),
    (4, "large"): Config(64, 64, 32, 4, 3),
    (4, "medium"): Config(64, 64, 32, 4, 3),
    (4, "small"): Config(32, 64, 32, 4, 3),
}
_CHOSEN: contextvars.ContextVar[Config | None] = contextvars.ContextVar("sgmim_fast.tile", default=None)

# (kernel, bytes per element of the operands) -> bytes that a thread may spill to its stack; other kernels must not
# spill. As compiled by Triton 3.9. Older versions spill more (3.5: 720 bytes in a gemm), which is reported but does not
# fail.
STACK_SINCE = 3, 9
STACK = {
    ("gemm._gemm_kernel", 2): 96,
    ("gemm._gemm_kernel", 4): 64,
    ("large_windows._large_windows_bias_kernel", 2): 56,
    ("large_windows._large_windows_keys_kernel", 2): 104,
    ("layer_norm._layer_norm_backward_kernel", 2): 16,
    ("layer_norm._layer_norm_forward_kernel", 2): 8,
    ("relational_guidance._relational_guidance_backward_kernel", 2): 184,
    ("relational_guidance._relational_guidance_backward_kernel", 4): 288,
    ("relational_guidance._relational_guidance_forward_kernel", 4): 8,
    ("structure_embed._structure_embed_backward_kernel", 4): 272,
    ("sums._columns_kernel", 4): 8,
    ("sums._finish_kernel", 4): 8,
    ("token_salience._columns_kernel", 2): 24,
    ("token_salience._rows_kernel", 4): 8,
    ("window_attention._window_attention_backward_kernel", 2): 632,
    ("window_attention._window_attention_backward_kernel", 4): 536,
    ("window_attention._window_attention_forward_kernel", 4): 16,
}
# Compute capability, times ten -> maximum shared memory of a block in bytes.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def shape_class(m: int, n: int) -> str:
    """Returns the class of a gemm (m, k) . (k, n); the problems of a launch count as one with the sum of their rows."""
    if -(-m // 128) * -(-n // 128) >= 96:
        return "large"
    return "medium" if m * n >= 1 << 15 else "small"


def tiles(element_size: int) -> list[Config]:
    """Returns the tiles that `sgmim_fast.tune` tries for an op's gemms: from large ones with long rows down to small
    ones that occupy all multiprocessors in a small gemm. Each thread has 16 to 128 accumulators; all fit capability
    8.0.
    """
    wide = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 256, 64, 4, 3), (64, 128, 64, 4, 4)]
    small = [(64, 64, 64, 4, 4), (32, 128, 64, 4, 4), (32, 64, 64, 4, 4)]
    narrow = [(128, 64, 32, 4, 3), (64, 64, 32, 4, 4), (64, 128, 32, 8, 3), (32, 64, 32, 4, 4)]
    return [Config(*sizes) for sizes in (narrow if element_size == 4 else wide + small)]


@contextlib.contextmanager
def use(tile: Config) -> Iterator[None]:
    """Within the block, gemms use our kernel with this configuration."""
    token = _CHOSEN.set(tile)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen() -> Config | None:
    """Returns the configuration set by `use`, or None."""
    return _CHOSEN.get()


def gemm(m: int, n: int, element_size: int) -> Config:
    """Returns the configuration of a gemm (m, k) . (k, n)."""
    return chosen() or PRODUCTS[element_size, shape_class(m, n)]
