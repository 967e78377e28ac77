"""The public ops, one file per op. Each runs on the backend that `sgmim_fast.backends` chooses."""

from sgmim_fast.ops.gather_patches import gather_patches
from sgmim_fast.ops.linear_l1 import linear_l1, linear_l2
from sgmim_fast.ops.masked_patch_embed import masked_patch_embed
from sgmim_fast.ops.norm_attention import norm_attention
from sgmim_fast.ops.norm_linear import norm_linear
from sgmim_fast.ops.norm_mlp import norm_mlp
from sgmim_fast.ops.position_bias import position_bias
from sgmim_fast.ops.relational_guidance import GuidanceParameters, relational_guidance
from sgmim_fast.ops.selective_mask import selective_mask
from sgmim_fast.ops.standardize_structure import standardize_structure
from sgmim_fast.ops.structure_embed import StructureParameters, structure_embed
from sgmim_fast.ops.token_salience import token_salience
from sgmim_fast.ops.window_attention import window_attention

__all__ = [
    "GuidanceParameters",
    "StructureParameters",
    "gather_patches",
    "linear_l1",
    "linear_l2",
    "masked_patch_embed",
    "norm_attention",
    "norm_linear",
    "norm_mlp",
    "position_bias",
    "relational_guidance",
    "selective_mask",
    "standardize_structure",
    "structure_embed",
    "token_salience",
    "window_attention",
]
