"""Columns that compute the guidance branch, from encoder features to the loss, on the same tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tools.measure import autocast, graphed
from tools.shapes import Shape
from tools.visible import visible_losses
from torch import Tensor, nn

from sgmim_fast import SGMIM, backends, reference, selective_mask, standardize_structure

FUSED = {"fused-cpu": "cpu", "fused-triton": "triton", "fused-cuda": "cuda"}
CAPTURED = tuple(f"{name}-captured" for name in ("dense", "visible", "fused-triton"))


class Features(nn.Module):
    """Replaces the encoder and returns given features, so that only the branch is measured."""

    def __init__(self, shape: Shape, features: Tensor):
        super().__init__()
        self.num_features, self.in_chans, self.patch_size = shape.width, 3, shape.patch
        self.features = features

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.features


@dataclass
class Case:
    """One encoder shape, dtype and batch, and the columns that compute it."""

    shape: Shape
    dtype: torch.dtype
    batch: int
    device: str
    model: SGMIM
    features: Tensor
    columns: dict[str, Callable[[], Tensor]]  # name -> function returning the loss

    def step(self, name: str) -> Callable[[], Tensor]:
        """Returns a function that runs forward and backward of a column. It first sets gradients to None."""
        plain = name.removesuffix("-captured")

        def run() -> Tensor:
            with backends.use(FUSED[plain]) if plain in FUSED else contextlib.nullcontext():
                self.model.zero_grad()
                self.features.grad = None
                loss = self.columns[name]()
                loss.backward()
                return loss

        return run if name == plain else graphed(run, [*self.model.parameters(), self.features])


def build(shape: Shape, dtype: torch.dtype, batch: int, device: str) -> Case:
    """Creates the columns that can run on the device."""
    torch.manual_seed(0)
    features = torch.randn(batch, shape.cells, shape.width, device=device, requires_grad=True)
    images = torch.randn(batch, 3, shape.image, shape.image, device=device)
    structure = standardize_structure(torch.rand(batch, 1, shape.image, shape.image, device=device))
    with torch.device(device):
        model = SGMIM(Features(shape, features), shape.stride, accelerate=False)
    drawn = selective_mask(batch, shape.grid, shape.ratio, device=device)
    side = shape.image // shape.stride
    cells = drawn.on((side, side))
    first = torch.arange(batch, device=device)[:, None] * shape.cells
    visible, masked = (rows.index.view(batch, -1) - first for rows in (cells.visible, cells.masked))

    in_dtype = functools.partial(autocast, device, dtype)
    dense = in_dtype(lambda: reference.sgmim_losses(model, images, structure, drawn).total)
    plain = in_dtype(lambda: visible_losses(model, features, images, structure, visible, masked).total)
    columns = {"dense": dense, "dense-compiled": torch.compile(dense)}
    columns |= {"visible": plain, "visible-compiled": torch.compile(plain)}
    for name, backend in FUSED.items():
        if (backend == "cpu") == (device == "cpu") and all(backends.can_run(op, backend)[0] for op in backends.BRANCH):
            columns[name] = in_dtype(model, images, structure, drawn)
    if device == "cuda":
        columns |= {name: columns[plain] for name in CAPTURED if (plain := name.removesuffix("-captured")) in columns}
    return Case(shape, dtype, batch, device, model, features, columns)
