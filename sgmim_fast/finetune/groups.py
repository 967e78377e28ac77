"""Parameter groups of fine-tuning: layer-wise decay of the learning rate, and no weight decay where it does harm."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from sgmim_fast.errors import UserError
from sgmim_fast.finetune.heads import DenseModel


def param_groups(model: DenseModel, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with "params", "weight_decay" and "lr_scale"; the caller multiplies rates by that.

    The encoder's layers are those of timm's `param_groups_layer_decay`: stem first, then block by block, a Swin's
    downsampling with the block behind it. Layer i of n has the scale layer_decay ** (n - i), and the head, layer n, has
    1; the last block so has layer_decay, as in BEiT's and the MIM protocols. (The published MIM depth code counts a
    Swin's three downsamplings as layers of their own, so its first layers learn still more slowly.)

    No weight decay on vectors, biases, and what timm's `no_weight_decay` names.

    Args:
        layer_decay: above 0 to 1, where all learn alike; 0 freezes the encoder (`DenseModel.freeze`) and leaves it out.

    Raises:
        UserError: layer_decay is outside 0 to 1.
    """
    if not 0 <= layer_decay <= 1:
        raise UserError(f"layer_decay is {layer_decay}; expected 0 (a frozen encoder) to 1 (no decay)")
    head = param_groups_weight_decay(model.head, weight_decay)
    groups = [{**group, "lr_scale": 1.0} for group in head]
    if layer_decay == 0:
        model.freeze()
        return groups
    encoder = model.features.model
    names = getattr(encoder, "no_weight_decay", set)()
    layers = param_groups_layer_decay(encoder, weight_decay, no_weight_decay_list=names, layer_decay=layer_decay)
    # timm counts the encoder alone, its last block with scale 1; here the head is one layer further
    return [{**group, "lr_scale": group["lr_scale"] * layer_decay} for group in layers] + groups
