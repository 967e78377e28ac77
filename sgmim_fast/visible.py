"""The two losses of SG-MIM on visible tokens only, through ops on packed rows. SPEC "The exact shortcut".

For masks made of whole cells. `model` is an `SGMIM`, which imports this. `sgmim_fast.dense` has the same on all tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from sgmim_fast import ops
from sgmim_fast.masking import SelectiveMask


def image_loss(model: nn.Module, features: Tensor, images: Tensor, mask: SelectiveMask) -> Tensor:
    """From encoder features (B, N, C), at masked cells."""
    head, stride, rows = model.image_head, model.encoder_stride, mask.masked.index
    scale = 1 / (rows.shape[0] * stride**2 + 1e-5) / model.in_chans
    features = features.flatten(0, 1)
    return ops.linear_l1(features, head.weight, head.bias, images, rows, cell=stride, packed=False, scale=scale)


def structure_loss(
    model: nn.Module, features: Tensor, structure: Tensor, mask: SelectiveMask, valid: Tensor | None
) -> Tensor:
    """From encoder features (B, N, C) and a map (B, S, H, W) that is 0 where it is not valid, at visible cells."""
    head, stride, rows = model.structure_head, model.encoder_stride, mask.visible.index
    context = model.structure_encoder.visible(structure, mask.shown)
    guided = model.guidance.visible(features.flatten(0, 1), context, mask.visible, mask.shown)
    scale = 1 / model.structure_channels
    if valid is None:
        scale /= rows.shape[0] * stride**2 + 1e-5
    loss = ops.linear_l1(guided, head.weight, head.bias, structure, rows, cell=stride, valid=valid, scale=scale)
    if valid is None:
        return loss
    counted = ops.gather_patches(valid, rows, cell=stride, patch=stride).sum().to(loss.dtype)
    return loss / (counted / model.structure_channels + 1e-5)
