"""Data sets of images and structure maps for pre-training: folders, WebDataset shards, and procedural scenes."""

try:
    import matplotlib  # noqa: F401
    import PIL  # noqa: F401
    import simplejpeg  # noqa: F401
    import torchvision  # noqa: F401
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"sgmim_fast.data needs {missing.name}, which is not installed: pip install 'sgmim_fast[train]'",
        name=missing.name,
    ) from None

from sgmim_fast.data.folders import FolderPairs
from sgmim_fast.data.image_file import IMAGE_SUFFIXES, ImageFile
from sgmim_fast.data.map_file import MAP_SUFFIXES
from sgmim_fast.data.pair import Item, Structure
from sgmim_fast.data.pictures import sheet
from sgmim_fast.data.report import BrokenFile, DataError, Report, skipped_lines, skipped_names
from sgmim_fast.data.scenes import Scenes
from sgmim_fast.data.shards import ShardPairs
from sgmim_fast.data.structure_file import StructureFile
from sgmim_fast.data.structure_kind import (
    Channels,
    Depth,
    Semantic,
    StructureKind,
    Surface,
    standardize_valid,
    structure_kind,
    structure_of,
)
from sgmim_fast.data.transform import Normalize, PairTransform

__all__ = [
    "IMAGE_SUFFIXES",
    "MAP_SUFFIXES",
    "BrokenFile",
    "Channels",
    "DataError",
    "Depth",
    "FolderPairs",
    "ImageFile",
    "Item",
    "Normalize",
    "PairTransform",
    "Report",
    "Scenes",
    "Semantic",
    "ShardPairs",
    "Structure",
    "StructureFile",
    "StructureKind",
    "Surface",
    "sheet",
    "skipped_lines",
    "skipped_names",
    "standardize_valid",
    "structure_kind",
    "structure_of",
]
