"""Launch configurations: fixed tables, so that nothing is tried out inside a training step.

Nothing here has been measured on a GPU yet. The lines are choices by reasoning: tiles that fill the multiprocessors at
a few thousand rows, and three stages of them in shared memory (`python -m sgmim_fast.kernels.compile` prints what they
take).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple


class Config(NamedTuple):
    """Of one launch of a gemm."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# (bytes of an operand's element, shape class) -> configuration, where `sgmim_fast.tune` has measured none
PRODUCTS = {
    (2, "large"): Config(128, 128, 64, 8, 3),
    (2, "medium"): Config(64, 128, 64, 4, 3),
    (2, "small"): Config(32, 64, 32, 4, 3),
    (4, "large"): Config(64, 64, 32, 4, 3),
    (4, "medium"): Config(64, 64, 32, 4, 3),
    (4, "small"): Config(32, 64, 32, 4, 3),
}
_CHOSEN: contextvars.ContextVar[Config | None] = contextvars.ContextVar("sgmim_fast.tile", default=None)

# (kernel, bytes of an operand's element) -> bytes that a thread may spill to its stack; every other kernel spills none.
# Seen with Triton 3.9. Older ones spill more (3.5: 720 bytes of a gemm), which is reported but is no failure.
STACK_SINCE = 3, 9
STACK = {
    ("layer_norm._layer_norm_backward_kernel", 2): 8,
    ("gemm._gemm_kernel", 2): 80,
    ("gemm._gemm_kernel", 4): 16,
    ("relational_guidance._relational_guidance_backward_kernel", 4): 288,
    ("relational_guidance._relational_guidance_forward_kernel", 4): 8,
    ("structure_embed._structure_embed_backward_kernel", 2): 48,
    ("structure_embed._structure_embed_backward_kernel", 4): 400,
    ("sums._columns_kernel", 4): 8,
    ("token_salience._columns_kernel", 2): 24,
    ("token_salience._rows_kernel", 4): 8,
    ("window_attention._window_attention_backward_kernel", 2): 288,
    ("window_attention._window_attention_backward_kernel", 4): 680,
    ("window_attention._window_attention_forward_kernel", 4): 16,
    ("window_attention._window_attention_keys_kernel", 2): 248,
}
# Compute capability, times ten -> bytes of shared memory that a block can have.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def shape_class(m: int, n: int) -> str:
    """Of a gemm (m, k) . (k, n), all problems of a launch counted as one with their rows together."""
    if -(-m // 128) * -(-n // 128) >= 96:
        return "large"
    return "medium" if m * n >= 1 << 15 else "small"


def tiles(element_size: int) -> list[Config]:
    """Those that `sgmim_fast.tune` tries for an op's gemms: large ones with long rows first, down to such as keep all
    multiprocessors busy where a gemm is small. Each leaves a thread 16 to 128 sums, and fits compute capability 8.0.
    """
    wide = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 256, 64, 4, 3), (64, 128, 64, 4, 4)]
    small = [(64, 64, 64, 4, 4), (32, 128, 64, 4, 4), (32, 64, 64, 4, 4)]
    narrow = [(128, 64, 32, 4, 3), (64, 64, 32, 4, 4), (64, 128, 32, 8, 3), (32, 64, 32, 4, 4)]
    return [Config(*sizes) for sizes in (narrow if element_size == 4 else wide + small)]


@contextlib.contextmanager
def use(tile: Config) -> Iterator[None]:
    """Within the block gemms go through our kernel, in this configuration."""
    token = _CHOSEN.set(tile)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen() -> Config | None:
    """What `use` says."""
    return _CHOSEN.get()


def gemm(m: int, n: int, element_size: int) -> Config:
    """The configuration of a gemm."""
    return chosen() or PRODUCTS[element_size, shape_class(m, n)]
