"""Fast SG-MIM: Structured Knowledge Guided Masked Image Modeling on visible tokens, with fused kernels."""

from sgmim_fast import backends, checkpoints, ops, reference
from sgmim_fast.accelerate import accelerate
from sgmim_fast.capture import capture
from sgmim_fast.checkpoints import export_timm, load_published, published_state_dict
from sgmim_fast.encoders import create_encoder
from sgmim_fast.masking import SelectiveMask, selective_mask
from sgmim_fast.model import SGMIM
from sgmim_fast.ops import standardize_structure
from sgmim_fast.reference import Losses
from sgmim_fast.rows import Rows

__version__ = "0.1.0"

__all__ = [
    "SGMIM",
    "Losses",
    "Rows",
    "SelectiveMask",
    "accelerate",
    "backends",
    "capture",
    "checkpoints",
    "create_encoder",
    "export_timm",
    "load_published",
    "ops",
    "published_state_dict",
    "reference",
    "selective_mask",
    "standardize_structure",
]
