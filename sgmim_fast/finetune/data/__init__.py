"""Labelled data sets for fine-tuning and evaluation: NYU-v2, KITTI and folders for depth, ADE20K and folders for
segmentation. docs/DOWNSTREAM_DATA.md describes their layouts.

`dense`: base class · `depth`, `segmentation`: maps, their checks, and folders of pairs · `lists`: split files · `nyu`,
`nyu_mat`, `kitti`, `ade20k`: one layout each · `scenes`: procedural scenes · `transform`, `colors`: augmentations of
the published recipes.
"""

from sgmim_fast.finetune.data.ade20k import ADE20K
from sgmim_fast.finetune.data.colors import DepthColors, SegmentationColors
from sgmim_fast.finetune.data.depth import DepthFolders
from sgmim_fast.finetune.data.kitti import KITTI
from sgmim_fast.finetune.data.nyu import NYU
from sgmim_fast.finetune.data.scenes import SceneMaps
from sgmim_fast.finetune.data.segmentation import SegmentationFolders
from sgmim_fast.finetune.data.transform import DenseEvaluation, DenseTransform

__all__ = [
    "ADE20K",
    "KITTI",
    "NYU",
    "DenseEvaluation",
    "DenseTransform",
    "DepthColors",
    "DepthFolders",
    "SceneMaps",
    "SegmentationColors",
    "SegmentationFolders",
]
