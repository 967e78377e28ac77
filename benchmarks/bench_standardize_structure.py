"""`standardize_structure` against sorting: pytest benchmarks/bench_standardize_structure.py"""

from __future__ import annotations

import pytest
import torch
from tools.shapes import SHAPES
from torch import Tensor

from sgmim_fast import backends, standardize_structure

BATCH = 16
MAPS = {
    "depth": lambda *shape: torch.distributions.Gamma(2.0, 1.0).sample(shape),
    "one octave": lambda *shape: (
        1 + torch.rand(shape)
    ),  # most values share the upper bits that the selection reads first
}


def sorting(structure: Tensor) -> Tensor:
    """Plain PyTorch."""
    count = structure[0].numel()
    kept = structure.flatten(1).sort(1).values[:, int(0.1 * count) : int(0.9 * count)]
    variance, mean = (t.view(-1, 1, 1, 1) for t in torch.var_mean(kept, 1))
    return (structure - mean) / (variance + 1e-6).sqrt()


@pytest.mark.parametrize("image", sorted({shape.image for shape in SHAPES.values()}))
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("name", ["sort", "torch", "cpu"])
def test_standardize_structure(benchmark, name, kind, image):
    torch.manual_seed(0)
    structure = MAPS[kind](BATCH, 1, image, image)
    benchmark.group = f"{kind}, {BATCH} x {image}^2"
    if name == "sort":
        benchmark(sorting, structure)
        return
    if not (usable := backends.can_run("standardize_structure", name, structure, False))[0]:
        pytest.skip(usable[1])
    with backends.use(name):
        torch.testing.assert_close(standardize_structure(structure), sorting(structure), rtol=1e-5, atol=1e-5)
        benchmark(standardize_structure, structure)
