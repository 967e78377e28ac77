"""MAE with guidance as a careful PyTorch user would write it: timm's blocks, none of our kernels, autograd.

All images have the same number of masked patches, so that everything is batched. The stem embeds the visible patches,
the image head is applied to the masked ones, and the branch is that of `visible.py`.
"""

from __future__ import annotations

import torch
from tools.visible import cells_of, structure_loss, take
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast import SGMIM
from sgmim_fast.reference import Losses


def mae_losses(model: SGMIM, images: Tensor, structure: Tensor, visible: Tensor, masked: Tensor) -> Losses:
    """Computes the losses for the visible and masked patches of each image, indices (B, V) and (B, K). `model` has a
    decoder and is not accelerated."""
    vit, decoder, batch = model.encoder.model, model.decoder, len(images)
    stem, pixels = vit.patch_embed.proj, cells_of(images, model.patch_size)
    x = F.linear(take(pixels, visible), stem.weight.flatten(1), stem.bias)
    x = x + take(vit.pos_embed[:, 1:].expand(batch, -1, -1), visible)
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(batch, -1, -1)
    latent = vit.norm(vit.blocks(torch.cat([first, x], 1)))

    y = decoder.embed(latent)
    tokens = torch.cat([y[:, 1:], decoder.mask_token.to(y.dtype).expand(batch, masked.shape[1], -1)], 1)
    tokens = take(tokens, torch.cat([visible, masked], 1).argsort(1))
    y = decoder.blocks(torch.cat([y[:, :1], tokens], 1) + decoder.pos_embed)
    prediction = model.image_head(decoder.norm(take(y[:, 1:], masked)))
    image = (prediction - take(pixels, masked)).abs().sum() / prediction.numel()
    guided = structure_loss(model, latent[:, 1:], structure, visible, masked)
    return Losses(image + guided, image, guided)
