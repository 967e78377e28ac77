"""`standardize_structure` against sorting: pytest benchmarks/bench_standardize_structure.py"""

from __future__ import annotations

import pytest
import torch
from tools.op_bench import BACKENDS, BATCH, compare
from tools.shapes import SHAPES

from sgmim_fast.ops import cases

MAPS = {
    "depth": lambda *shape: torch.distributions.Gamma(2.0, 1.0).sample(shape),
    "one octave": lambda *shape: (
        1 + torch.rand(shape)
    ),  # most values agree in the upper bits, which the radix selection reads first
}


def sorting(a):
    """Plain PyTorch: sorts the values of each map."""
    count = a.structure[0].numel()
    kept = a.structure.flatten(1).sort(1).values[:, int(0.1 * count) : int(0.9 * count)]
    variance, mean = (t.view(-1, 1, 1, 1) for t in torch.var_mean(kept, 1))
    return (a.structure - mean) / (variance + 1e-6).sqrt()


@pytest.mark.parametrize("image", sorted({shape.image for shape in SHAPES.values()}))
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("name", ["sort", *BACKENDS])
def test_standardize_structure(benchmark, name, kind, image):
    torch.manual_seed(0)
    a = cases.standardize_structure((BATCH, 1, image, image))
    a = a._replace(structure=MAPS[kind](*a.structure.shape))
    compare(benchmark, "standardize_structure", name, f"{kind}, {image}^2", "float32", a, sort=sorting)
