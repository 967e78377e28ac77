"""Procedural scenes: exact depth, all classes, and colours that do not depend on depth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sgmim_fast import data
from sgmim_fast.data.scene import BACKGROUND, BOX, PLANE, SPHERE, Solid

SIZE = 48


def distance_to_surface(solid: Solid, points: np.ndarray) -> np.ndarray:
    """Returns the signed distance (P,) of points (3, P) from a solid: positive outside, for the background room
    positive inside. The formula does not use rays."""
    local = solid.axes.T @ (points - solid.centre[:, None])
    if solid.kind == SPHERE:
        return np.linalg.norm(local, axis=0) - solid.half[0]
    beyond = np.abs(local) - solid.half[:, None]
    if solid.kind == BACKGROUND:
        return -beyond.max(0)
    return np.linalg.norm(np.maximum(beyond, 0), axis=0) + np.minimum(beyond.max(0), 0)


@pytest.mark.parametrize("index", range(12))
def test_depth_is_exact(index):
    """Every pixel shows a surface of its class, and nothing is in front of it."""
    scenes = data.Scenes(100, SIZE, labels=True)
    item, scene = scenes[index], scenes.scene(index)
    depth, labels = item["structure"][0].double().numpy().ravel(), item["labels"].numpy().ravel()
    along = (np.arange(SIZE) + 0.5 - SIZE / 2) / (scene.focal * SIZE)
    v, u = np.meshgrid(along, along, indexing="ij")
    rays = np.stack([u.ravel(), v.ravel(), np.ones(SIZE * SIZE)])
    distances = np.stack([distance_to_surface(solid, depth * rays) for solid in scene.solids])
    kinds = np.array([solid.kind for solid in scene.solids])
    on_surface = np.abs(np.where(kinds[:, None] == labels, distances, np.inf)).min(0)
    assert on_surface.max() < 1e-4  # rounding of float32 (5e-7 at depth 13) is amplified by grazing rays
    for share in np.linspace(0.02, 0.98, 25):  # nothing is in the way
        before = np.stack([distance_to_surface(solid, share * depth * rays) for solid in scene.solids])
        assert before.min() > -1e-6
    for card in (solid for solid in scene.solids if solid.kind == PLANE):
        start, end = card.axes.T @ -card.centre, card.axes.T @ (0.999 * depth * rays - card.centre[:, None])
        share = start[2] / (start[2] - end[2])  # share of the way at the card's plane
        meeting = np.abs(start[:, None] + share * (end - start[:, None]))
        assert not ((share > 0) & (share < 1) & (meeting[:2] < card.half[:2, None]).all(0)).any()


def test_all_classes_occur_and_hide_each_other():
    items = [data.Scenes(200, SIZE, labels=True)[index] for index in range(40)]
    labels = torch.stack([item["labels"] for item in items])
    assert labels.dtype == torch.int64 and labels.shape == (40, SIZE, SIZE)
    shares = torch.bincount(labels.flatten(), minlength=4) / labels.numel()
    assert len(shares) == 4 and shares.min() > 0.05
    for kind in (BACKGROUND, SPHERE, BOX, PLANE):
        assert (labels == kind).flatten(1).any(1).float().mean() > 0.3
    steps = torch.stack([item["structure"][0] for item in items]).diff(dim=2).abs()
    assert (steps > 0.5).flatten(1).any(1).float().mean() > 0.9  # depth jumps at outlines


def test_colour_does_not_tell_depth():
    """Across scenes, the best polynomial of degree 2 in red, green and blue explains almost no depth."""
    dataset = data.Scenes(1000, 16)
    items = [dataset[index] for index in range(150)]
    colours = torch.stack([item["image"] for item in items]).movedim(1, -1).reshape(-1, 3).double()
    depth = torch.stack([item["structure"] for item in items]).flatten().double()
    squares = (colours[:, :, None] * colours[:, None]).flatten(1)
    features = torch.cat([torch.ones(len(colours), 1), colours, squares], 1)
    residual = depth - features @ torch.linalg.lstsq(features, depth[:, None], driver="gelsd").solution[:, 0]
    assert residual.var() / depth.var() > 0.9


def test_a_scene_depends_on_seed_and_index_alone():
    first = data.Scenes(3, 16)[2]
    assert torch.equal(first["image"], data.Scenes(500, 16)[2]["image"])
    assert torch.equal(first["structure"], data.Scenes(3, 16)[-1]["structure"])
    assert not torch.equal(first["structure"], data.Scenes(3, 16)[1]["structure"])
    assert not torch.equal(first["structure"], data.Scenes(3, 16, seed=1)[2]["structure"])
    assert first["structure"].isfinite().all() and "labels" not in first
    with pytest.raises(IndexError):
        data.Scenes(3, 16)[3]


def test_larger_pictures_show_the_same_scene():
    small, large = (data.Scenes(9, size)[4]["structure"] for size in (24, 72))
    same = (small - large[:, 1::3, 1::3]).abs() < 1e-3  # the middle one of 3 × 3 pixels has the same ray
    assert same.float().mean() > 0.99


def test_transforms_take_image_structure_and_labels_together():
    dataset = data.Scenes(9, 40, labels=True, transform=data.PairTransform(32))
    item = dataset[0]
    assert item["image"].shape == (3, 32, 32) and item["labels"].shape == (32, 32)
    assert item["labels"].dtype == torch.int64
    dataset.set_epoch(1)
    other = dataset[0]
    assert not torch.equal(other["structure"], item["structure"])
    both = torch.stack([torch.stack([i["structure"][0], i["labels"].float()]).flatten(1) for i in (item, other)])
    for kind in range(4):  # crops differ, but the depths of a label's pixels hardly do
        depths = [structure[labels == kind] for structure, labels in both]
        if min(map(len, depths)) > 50:
            assert abs(depths[0].median() - depths[1].median()) < 0.5


def test_bad_arguments():
    with pytest.raises(ValueError, match="count is 0 and size is 16"):
        data.Scenes(0, 16)
    with pytest.raises(ValueError, match="seed is -1"):
        data.Scenes(1, 16, seed=-1)
    with pytest.raises(ValueError, match="epoch is -1"):
        data.Scenes(1, 16).set_epoch(-1)
