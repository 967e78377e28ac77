"""Golden numbers of the published code: cases, and the inputs and parameters from which they were computed.

`data/golden_cases.json` has only numbers. Inputs and weights are drawn again in float64 from NumPy's frozen legacy
generator, each with its own key: `RandomState(crc32(f"{salt}/{what}"))`.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

UNIT = 32  # pixels per mask unit
_SIZES = {"swin": 192, "vit_encoder": 224}
_PATCHES = {"swin": 4, "vit_encoder": 16}


def cases(kind: str) -> list[dict[str, Any]]:
    """Returns all cases of a kind: "swin", "vit_encoder" or "standardize"."""
    path = Path(__file__).parent / "data" / "golden_cases.json"
    return [case for case in json.loads(path.read_text())["cases"] if case["kind"] == kind]


def _generator(key: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(key.encode()))


def normal(key: str, shape: Sequence[int]) -> Tensor:
    """Returns a standard normal float64 tensor for a key such as "salt/cotangent"."""
    return torch.from_numpy(_generator(key).standard_normal(tuple(shape)))


def parameter(salt: str, name: str, shape: Sequence[int]) -> Tensor:
    """Returns the float64 parameter that the published code calls `name`."""
    v = normal(f"{salt}/{name}", shape)
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + 0.1 * v
    if len(shape) == 1 or name.endswith("bias") or "gamma" in name:
        return 0.1 * v
    if "token" in name or "bias_table" in name:
        return 0.02 * v
    return v / math.sqrt(math.prod(shape[1:]))


def parameters(salt: str, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a published state dict: a random value for every name, in the shape of the tensor given with it."""
    return {name: parameter(salt, name, like.shape) for name, like in shapes.items()}


def images(case: Mapping[str, Any]) -> Tensor:
    """Returns images (B, 3, H, W), float64."""
    size = _SIZES[case["kind"]]
    return normal(f"{case['salt']}/images", (case["batch"], 3, size, size))


def structure(case: Mapping[str, Any]) -> Tensor:
    """Returns structure maps (B, 1, H, W), float64, to be used without standardising."""
    size = _SIZES[case["kind"]]
    return normal(f"{case['salt']}/structure", (case["batch"], 1, size, size))


def depth(case: Mapping[str, Any]) -> Tensor:
    """Returns depth maps (B, 1, H, W), float64: the input of a "standardize" case."""
    shape = (case["batch"], 1, case["size"], case["size"])
    return torch.from_numpy(_generator(case["salt"]).standard_gamma(2.0, shape))


def mask(case: Mapping[str, Any]) -> Tensor:
    """Returns the mask (B, H/p, W/p), bool, at the resolution of the encoder's stem, 1 = masked."""
    grid = _SIZES[case["kind"]] // UNIT
    generator = _generator(f"{case['salt']}/mask")
    units = np.zeros((case["batch"], grid * grid), dtype=bool)
    for image in units:
        image[generator.permutation(grid * grid)[: case["masked_units"]]] = True
    repeats = UNIT // _PATCHES[case["kind"]]
    drawn = torch.from_numpy(units).reshape(-1, grid, grid)
    return drawn.repeat_interleave(repeats, 1).repeat_interleave(repeats, 2)


def statistics(tensor: Tensor) -> dict[str, Any]:
    """Returns Euclidean norm, sum and first four values in row-major order, in float64."""
    values = tensor.detach().double().reshape(-1)
    return {"norm": values.norm().item(), "sum": values.sum().item(), "first": values[:4].tolist()}


def assert_statistics(tensor: Tensor, expected: Mapping[str, Any], rtol: float, what: str = "tensor") -> None:
    """Asserts that the statistics of a tensor are the expected ones.

    `rtol` bounds the relative error of the norm. A sum of n values may be off by `rtol` times sqrt(n) root mean
    squares, since errors of both signs add up like a random walk. A single value may be off by 3 rtol of the root mean
    square or of itself, whichever is larger. Measured in float32, for the model and the dense reference implementation:
    norms 1.3e-6, sums 6.0e-6, the worst of a thousand single values 9.9e-6.
    """
    actual = statistics(tensor)
    norm, count = expected["norm"], tensor.numel()
    rms = norm / math.sqrt(count)
    bounds = [("norm", actual["norm"], norm, norm), ("sum", actual["sum"], expected["sum"], norm)]
    for i, (a, e) in enumerate(zip(actual["first"], expected["first"], strict=True)):
        bounds.append((f"value {i}", a, e, 3 * max(rms, abs(e))))
    for statistic, a, e, scale in bounds:
        error = abs(a - e)
        assert error <= rtol * scale, f"{what}: {statistic} is {a}, expected {e}, off by {error / scale:.1e} of {scale}"
