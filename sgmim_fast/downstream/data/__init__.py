"""Data sets of depth and segmentation."""

from sgmim_fast.downstream.data.scenes import SceneMaps

__all__ = ["SceneMaps"]
