"""Benchmarks of single ops against plain PyTorch: pytest benchmarks/bench_ops.py [-k NAME]

Forward and backward at the sizes of the published recipes, unless a group's title says otherwise. A column is a way to
compute the op in plain PyTorch, or a backend, whose results and gradients are first compared with the plain ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import window_partition, window_reverse
from tools.agree import assert_agree
from tools.op_bench import forward_backward
from tools.shapes import SHAPES
from tools.visible import guide, structure_tokens
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast import backends, reference, selective_mask
from sgmim_fast.guidance import RelationalGuidance, StructureEncoder, embedding_patch
from sgmim_fast.masking import resize
from sgmim_fast.ops import cases, gather_patches
from sgmim_fast.ops.gather_patches import patch_order
from sgmim_fast.ops.window_attention import MAX_LOGIT_SCALE

BATCH, MASKS = 16, 128  # images; MASKS: of `selective_mask`
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKENDS = ("torch", "cpu")


def compare(
    benchmark: Any, op: str, name: str, group: str, dtype: str, arguments: Any, backward: bool = True, **plain: Callable
) -> None:
    """Times one column: a function of `plain`, or a backend, after its results and gradients were compared with those
    of the first function of `plain`.

    Args:
        name: name of the column: one of `plain`, or a backend.
        group: title of the group of columns.
        dtype: dtype of the column.
        arguments: arguments of the op, which the functions of `plain` are also called with.
    """
    benchmark.group = f"{op} {group}, {dtype}, B = {BATCH}{'' if backward else ', forward'}"
    run, in_dtype = forward_backward(op, arguments, backward), DTYPES[dtype]
    if name in plain:
        benchmark(run, plain[name], in_dtype)
        return
    if not (usable := backends.can_run(op, name))[0]:
        pytest.skip(usable[1])
    truth, ours = next(iter(plain.values())), functools.partial(cases.call, op)
    with backends.use(name):
        found = run(ours, in_dtype), run(truth, in_dtype), run(truth, torch.float32)
        assert_agree(*([t.float() for t in results] for results in found), in_dtype)
        benchmark(run, ours, in_dtype)


# name -> (channels, Z-order) of what the model gathers: patches of the structure map, in Z-order, and cells of the loss
GATHERED = {"structure": (1, True), "pixels": (3, False)}


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("case", GATHERED)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", ["plain", "cpu"])
def test_gather_patches(benchmark, name, backward, case, encoder):
    torch.manual_seed(0)
    shape, (channels, zorder) = SHAPES[encoder], GATHERED[case]
    cell, grid = shape.stride, (shape.image // shape.stride,) * 2
    rows = selective_mask(BATCH, shape.grid, scale=shape.unit // cell).masked.index
    patch = 4 if case == "structure" else cell
    a = cases.gather_patches([shape.masked] * BATCH, grid, channels, cell, patch, zorder=zorder, rows=rows)

    def plain(a):
        """Unfolds all cells, then selects those in `rows`."""
        (batch, channels, height, width), cell, patch = a.pixels.shape, a.cell, a.patch
        side = cell // patch
        cells = a.pixels.view(batch, channels, height // cell, side, patch, width // cell, side, patch)
        cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, side * side, channels * patch * patch)[a.rows]
        if a.zorder:
            cells = cells[:, patch_order(side, True)]
        return cells.reshape(-1, channels * patch * patch)

    compare(benchmark, "gather_patches", name, f"{encoder} {case}", "float32", a, backward, plain=plain)


CHANNELS = {"image": 3, "structure": 1}  # head -> channels of its target


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("head", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "visible", *BACKENDS])
def test_linear_l1(benchmark, name, dtype, head, encoder):
    """The image head reads the masked cells, the structure head the visible ones."""
    torch.manual_seed(0)
    shape, channels = SHAPES[encoder], CHANNELS[head]
    grid = (shape.image // shape.stride,) * 2
    drawn = selective_mask(BATCH, shape.grid, shape.ratio)
    rows = (drawn.on(grid).masked if head == "image" else drawn.on(grid).visible).index
    counts = [len(rows) // BATCH] * BATCH
    options = {"packed": False, "decided": True, "rows": rows}
    a = cases.linear_l1(counts, grid, channels, shape.stride, shape.width, **options)
    counted = reference.pixel_mask(drawn.mask if head == "image" else ~drawn.mask, a.target)

    def dense(a):
        x, layer = a.x.view(BATCH, shape.cells, -1), functools.partial(F.linear, weight=a.weight, bias=a.bias)
        return (counted * (reference.predict(x, layer, a.target, a.cell) - a.target).abs()).sum()

    def visible(a):
        target = gather_patches(a.target, rows, cell=a.cell, patch=a.cell)
        return (F.linear(a.x[rows], a.weight, a.bias) - target).abs().sum()

    compare(benchmark, "linear_l1", name, f"{encoder} {head} head", dtype, a, dense=dense, visible=visible)


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", ["dense", *BACKENDS])
def test_masked_patch_embed(benchmark, name, backward, encoder):
    torch.manual_seed(0)
    shape, normed = SHAPES[encoder], encoder != "vit_base"
    grid, drawn = (shape.image // shape.patch,) * 2, selective_mask(BATCH, shape.grid, scale=shape.unit // shape.patch)
    options = {"norm": normed, "visible": drawn.visible.index}
    a = cases.masked_patch_embed(BATCH, grid, 3, shape.patch, shape.stem, **options)
    masked = drawn.mask.flatten(1)[..., None].float()

    def dense(a):
        tokens = F.conv2d(a.x, a.weight, a.bias, stride=shape.patch).flatten(2).mT
        if normed:
            tokens = F.layer_norm(tokens, tokens.shape[2:], a.norm_weight, a.norm_bias)
        return tokens * (1 - masked) + a.mask_token * masked

    compare(benchmark, "masked_patch_embed", name, encoder, "float32", a, backward, dense=dense)


@pytest.mark.parametrize("encoder", ["swin_base", "vit_base"])
@pytest.mark.parametrize("layer", ["norm and qkv", "projection and residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", *BACKENDS])
def test_norm_linear(benchmark, name, dtype, layer, encoder):
    """In the encoder's deepest stage."""
    torch.manual_seed(0)
    (side, width), normed = SHAPES[encoder].deepest, layer == "norm and qkv"
    rows, out = (BATCH, side**2 + SHAPES[encoder].prefix), 3 * width if normed else width
    a = cases.norm_linear(rows, width, out, norm=normed, residual=not normed)

    def plain(a):
        if a.norm_weight is None:
            return a.residual + F.linear(a.x, a.weight, a.bias)
        return F.linear(F.layer_norm(a.x, a.x.shape[-1:], a.norm_weight, a.norm_bias, a.eps), a.weight, a.bias)

    compare(benchmark, "norm_linear", name, f"{encoder} {layer}", dtype, a, plain=plain)


@pytest.mark.parametrize("encoder", ["swin_base", "vit_base"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", *BACKENDS])
def test_norm_mlp(benchmark, name, dtype, residual, encoder):
    """In the encoder's deepest stage."""
    torch.manual_seed(0)
    side, width = SHAPES[encoder].deepest
    a = cases.norm_mlp((BATCH, side**2 + SHAPES[encoder].prefix), width, 4 * width, residual=residual)

    def plain(a):
        y = F.layer_norm(a.x, a.x.shape[-1:], a.norm_weight, a.norm_bias, a.eps)
        y = F.linear(F.gelu(F.linear(y, a.fc1_weight, a.fc1_bias)), a.fc2_weight, a.fc2_bias)
        return a.x + y if a.residual else y

    compare(benchmark, "norm_mlp", name, f"{encoder}{', residual' if residual else ''}", dtype, a, plain=plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [4, 16])
@pytest.mark.parametrize("name", ["plain", *BACKENDS])
def test_position_bias(benchmark, name, heads, dtype):
    """For windows of 12 x 12 tokens, with the heads of SwinV2-B's first and third stages."""
    torch.manual_seed(0)
    a = cases.position_bias((12, 12), heads, 512)

    def plain(a):
        hidden = F.relu(F.linear(a.coordinates, a.fc1_weight, a.fc1_bias))
        return (a.scale * F.linear(hidden, a.fc2_weight).sigmoid()).flatten(0, -2)

    compare(benchmark, "position_bias", name, f"{heads} heads", dtype, a, plain=plain)


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "visible", *BACKENDS])
def test_relational_guidance(benchmark, name, dtype, encoder):
    """With gradients of features, structure tokens and parameters."""
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    side = shape.image // shape.stride
    drawn = selective_mask(BATCH, shape.grid, shape.ratio)
    cells = drawn.on((side, side))
    seen, shown = cells.visible.index, cells.shown.index
    module = RelationalGuidance(shape.width, shape.heads)
    sizes = [shape.visible] * BATCH, None, shape.cells, shape.width, shape.heads
    a = cases.relational_guidance(*sizes, rows=(cells.visible, cells.shown))
    a = a._replace(parameters=module.parameters_for_op())
    # position of each cell's token in a.structure, whose last row is the token of all hidden cells
    place = torch.full((BATCH * shape.cells,), len(shown)).index_copy_(0, shown, torch.arange(len(shown)))

    def dense(a):
        x, context = (t.view(BATCH, shape.cells, -1) for t in (a.features, a.structure[place]))
        guided = module(x, context, resize(drawn.mask, side, side).flatten(1))
        return guided.flatten(0, 1)[seen]

    def visible(a):
        last = a.structure[-1].expand(BATCH, 1, -1)
        context = torch.cat([a.structure[:-1].view(BATCH, -1, shape.width), last], 1)
        x = a.features[seen].view(BATCH, -1, shape.width)
        return guide(SimpleNamespace(guidance=module), x, context, shape.visible).flatten(0, 1)

    compare(benchmark, "relational_guidance", name, encoder, dtype, a, dense=dense, visible=visible)


@pytest.mark.parametrize("grid", [*sorted({shape.grid for shape in SHAPES.values()}), 64])
@pytest.mark.parametrize("name", ["randperm", "torch", "cpu"])
def test_selective_mask(benchmark, name, grid):
    count = math.ceil(0.6 * grid * grid)
    benchmark.group = f"{MASKS} x {grid}^2 units"

    def randperm() -> tuple[Tensor, Tensor, Tensor]:
        """Returns the mask and the visible and masked rows."""
        mask = torch.zeros(MASKS, grid * grid, dtype=torch.bool)
        for image in mask:
            image[torch.randperm(grid * grid)[:count]] = True
        flat = mask.flatten()
        return mask.view(MASKS, grid, grid), (~flat).nonzero().flatten(), flat.nonzero().flatten()

    if name == "randperm":
        benchmark(randperm)
        return
    if not (usable := backends.can_run("selective_mask", name))[0]:
        pytest.skip(usable[1])
    with backends.use(name):
        drawn = selective_mask(MASKS, grid)
        assert (drawn.mask.flatten(1).sum(1) == count).all()
        assert torch.equal(drawn.masked.index, drawn.mask.flatten().nonzero().flatten())
        benchmark(selective_mask, MASKS, grid)


MAPS = {  # within one octave, most values agree in the upper bits, which the radix selection reads first
    "depth": lambda *shape: torch.distributions.Gamma(2.0, 1.0).sample(shape),
    "one octave": lambda *shape: 1 + torch.rand(shape),
}


@pytest.mark.parametrize("image", sorted({shape.image for shape in SHAPES.values()}))
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("name", ["sort", *BACKENDS])
def test_standardize_structure(benchmark, name, kind, image):
    torch.manual_seed(0)
    a = cases.standardize_structure((BATCH, 1, image, image))
    a = a._replace(structure=MAPS[kind](*a.structure.shape))

    def sorting(a):
        count = a.structure[0].numel()
        kept = a.structure.flatten(1).sort(1).values[:, int(0.1 * count) : int(0.9 * count)]
        variance, mean = (t.view(-1, 1, 1, 1) for t in torch.var_mean(kept, 1))
        return (a.structure - mean) / (variance + 1e-6).sqrt()

    compare(benchmark, "standardize_structure", name, f"{kind}, {image}^2", "float32", a, sort=sorting)


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dense", "visible", *BACKENDS])
def test_structure_embed(benchmark, name, dtype, encoder):
    """With gradients of the parameters."""
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    side = shape.image // shape.stride
    drawn = selective_mask(BATCH, shape.grid, shape.ratio)
    shown = drawn.on((side, side)).shown
    hidden = (~resize(drawn.mask, side, side)).flatten().nonzero()[0]  # one suffices, since all have the same token
    stem = resize(drawn.mask, shape.image // shape.patch, shape.image // shape.patch)
    module = StructureEncoder(1, shape.width, shape.stride)
    patch, mergings = embedding_patch(shape.stride)
    sizes = [shape.masked] * BATCH, (side, side), 1, patch, mergings, shape.width >> mergings
    a = cases.structure_embed(*sizes, rows=shown.index)._replace(parameters=module.parameters_for_op().flat())

    def dense(a):
        tokens = module(a.structure, stem).flatten(0, 1)
        return tokens[torch.cat([a.rows, hidden])]

    def visible(a):
        masked = a.rows.view(BATCH, -1) - torch.arange(BATCH)[:, None] * shape.cells
        tokens = structure_tokens(SimpleNamespace(structure_encoder=module), a.structure, masked)
        return torch.cat([tokens[:, :-1].flatten(0, 1), tokens[:1, -1]])

    compare(benchmark, "structure_embed", name, encoder, dtype, a, dense=dense, visible=visible)


@pytest.mark.parametrize("encoder", SHAPES)
@pytest.mark.parametrize("name", ["written", *BACKENDS])
def test_token_salience(benchmark, name, encoder):
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    a = cases.token_salience((BATCH, (shape.image // shape.patch) ** 2, shape.stem))

    def written(a):
        """Stores the attention, (B, N, N)."""
        s = (a.x @ a.x.mT).softmax(-1).sum(-2)
        low, high = s.aminmax(dim=1, keepdim=True)
        return (s - low) / (high - low)

    compare(benchmark, "token_salience", name, encoder, "float32", a, written=written)


WINDOWS = {"swin_base": 6, "swinv2_base": 12}  # tokens along each side of a window; a ViT's tokens are one window
SHIFTED = [("swin_base", False), ("swin_base", True), ("swinv2_base", False), ("vit_base", False)]  # encoder, shifted


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """Returns timm's mask, (windows, n, n): -100 between tokens that are in one window only by the cyclic shift."""
    group = (torch.arange(side) >= side - window).long() + (torch.arange(side) >= side - shift)
    groups = window_partition((3 * group[:, None] + group)[None, :, :, None], (window, window)).flatten(1)
    return torch.where(groups[:, None] == groups[:, :, None], 0.0, -100.0)


@pytest.mark.parametrize(("encoder", "shifted"), SHIFTED, ids=[f"{e}{', shifted' if s else ''}" for e, s in SHIFTED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", *BACKENDS])
def test_window_attention(benchmark, name, dtype, encoder, shifted):
    """In the encoder's deepest stage, between the projections. A Swin's bias comes from its table; a ViT has none."""
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    side, width = shape.deepest
    heads, window, shift = width // (64 if shape.prefix else 32), WINDOWS.get(encoder), 0
    if window is None:
        one = (1, side**2 + shape.prefix)
        a = cases.window_attention((BATCH, *one), heads, 64, one, (0, 0), bias=None, pad=False)
    else:
        shift, hottest = window // 2 if shifted else 0, 2.3 if encoder == "swinv2_base" else None
        options = {"hottest": hottest, "pad": False}
        a = cases.window_attention((BATCH, side, side), heads, 32, (window, window), (shift, shift), **options)
        mask = shift_mask(side, window, shift)[:, None]

    def plain(a):
        """timm's arithmetic."""

        def split(x):
            return x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)

        if a.bias is None:
            return F.scaled_dot_product_attention(*split(a.qkv[:, 0])).transpose(1, 2).flatten(2)[:, None]
        rolled = a.qkv.roll((-shift, -shift), (1, 2)) if shift else a.qkv
        q, k, v = split(window_partition(rolled, (window, window)).flatten(1, 2))
        bias = a.bias[a.index].permute(2, 0, 1)
        if shift:
            bias = bias + mask.repeat(BATCH, 1, 1, 1)
        if a.logit_scale is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).expand(len(q), -1, -1, -1))
        else:
            scale = a.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()[:, None, None]
            y = ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * scale + bias).softmax(-1).to(v.dtype) @ v
        y = window_reverse(y.transpose(1, 2).flatten(2).unflatten(1, (window, window)), (window, window), side, side)
        return y.roll((shift, shift), (1, 2)) if shift else y

    compare(benchmark, "window_attention", name, f"{encoder}{', shifted' if shifted else ''}", dtype, a, plain=plain)
