"""Launch configurations: fixed tables, so that nothing is tried out inside a training step.

Nothing here has been measured on a GPU yet. The lines are choices by reasoning: tiles that fill the multiprocessors at
a few thousand rows, and three stages of them in shared memory (`python -m sgmim_fast.kernels.compile` prints what they
take).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple


class Config(NamedTuple):
    """Of one launch of a product."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# (bytes of an operand's element, shape class) -> configuration, where the architecture's own table has none
PRODUCTS = {
    (2, "large"): Config(128, 128, 64, 8, 3),
    (2, "medium"): Config(64, 128, 64, 4, 3),
    (2, "small"): Config(32, 64, 32, 4, 3),
    (4, "large"): Config(64, 64, 32, 4, 3),
    (4, "medium"): Config(64, 64, 32, 4, 3),
    (4, "small"): Config(32, 64, 32, 4, 3),
}
TUNED = Path(__file__).with_name("tuned")  # sm_XX.json: an architecture's own, measured


# (kernel, bytes of an operand's element) -> bytes that a thread may spill to its stack; every other kernel spills none.
# Seen with Triton 3.9. Older ones spill more (3.5: 720 bytes of a product), which is reported but is no failure.
STACK_SINCE = 3, 9
STACK = {
    ("layer_norm._layer_norm_backward_kernel", 2): 8,
    ("products._product_kernel", 2): 80,
    ("products._product_kernel", 4): 16,
    ("relational_guidance._relational_guidance_backward_kernel", 4): 288,
    ("relational_guidance._relational_guidance_forward_kernel", 4): 8,
    ("structure_embed._structure_embed_backward_kernel", 2): 48,
    ("structure_embed._structure_embed_backward_kernel", 4): 400,
    ("sums._columns_kernel", 4): 8,
    ("window_attention._window_attention_backward_kernel", 2): 288,
    ("window_attention._window_attention_backward_kernel", 4): 680,
    ("window_attention._window_attention_forward_kernel", 4): 16,
    ("window_attention._window_attention_keys_kernel", 2): 248,
}
# Compute capability, times ten -> bytes of shared memory that a block can have.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def shape_class(m: int, n: int) -> str:
    """Of a product (m, k) . (k, n), all problems of a launch counted as one with their rows together."""
    if -(-m // 128) * -(-n // 128) >= 96:
        return "large"
    return "medium" if m * n >= 1 << 15 else "small"


@functools.cache
def tuned(architecture: str) -> dict[tuple[int, str], Config]:
    """What `python -m sgmim_fast.kernels.tune` has written for this architecture."""
    path = TUNED / f"{architecture}.json"
    if not path.is_file():
        return {}
    return {(size, kind): Config(*config) for size, kind, *config in json.loads(path.read_text())}


def product(m: int, n: int, element_size: int, architecture: str) -> Config:
    """The configuration of a product; `architecture` as "sm_90", or "any"."""
    key = element_size, shape_class(m, n)
    return tuned(architecture).get(key) or PRODUCTS[key]
