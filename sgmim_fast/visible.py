"""The two losses of SG-MIM on visible tokens only, through ops on packed rows. SPEC "The exact shortcut".

For masks made of whole cells. `model` is an `SGMIM`, which imports this. `sgmim_fast.dense` has the same on all tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from sgmim_fast import ops
from sgmim_fast.masking import SelectiveMask
from sgmim_fast.visible_encoder import VisibleTokens


def image_loss(model: nn.Module, features: Tensor | VisibleTokens, images: Tensor, mask: SelectiveMask) -> Tensor:
    """From encoder features (B, N, C), or with a decoder those of the visible cells, at masked cells."""
    head, stride, rows = model.image_head, model.encoder_stride, mask.masked.index
    count = rows.shape[0] * stride**2
    if model.decoder is None:
        tokens, packed, scale = features.flatten(0, 1), False, 1 / (count + 1e-5) / model.in_chans
    else:
        tokens, packed = model.decoder.masked(features, mask.visible.index, rows, tuple(mask.mask.shape[1:])), True
        scale = 1 / max(count, 1) / model.in_chans  # MAE's mean
    op = ops.linear_l2 if model.loss == "l2" else ops.linear_l1
    options = {"cell": stride, "packed": packed, "normalized": model.target == "normalized_patch", "scale": scale}
    return op(tokens, head.weight, head.bias, images, rows, **options)


def structure_loss(
    model: nn.Module, features: Tensor | VisibleTokens, structure: Tensor, mask: SelectiveMask, valid: Tensor | None
) -> Tensor:
    """From encoder features (B, N, C), or with a decoder those of the visible cells, and a map (B, S, H, W) that is 0
    where it is not valid, at visible cells."""
    head, stride, rows = model.structure_head, model.encoder_stride, mask.visible.index
    context = model.structure_encoder.visible(structure, mask.shown)
    if model.decoder is None:
        guided = model.guidance.visible(features.flatten(0, 1), context, mask.visible, mask.shown)
    else:
        cells = mask.mask.shape[1] * mask.mask.shape[2]
        guided = model.guidance.visible(features.tokens, context, mask.visible, mask.shown, cells)
    scale = 1 / model.structure_channels
    if valid is None:
        scale /= rows.shape[0] * stride**2 + 1e-5
    loss = ops.linear_l1(guided, head.weight, head.bias, structure, rows, cell=stride, valid=valid, scale=scale)
    if valid is None:
        return loss
    counted = ops.gather_patches(valid, rows, cell=stride, patch=stride).sum().to(loss.dtype)
    return loss / (counted / model.structure_channels + 1e-5)
