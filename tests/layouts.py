"""Tiny data sets in the folder layouts of NYU-v2, KITTI and ADE20K, for the tests of `sgmim_fast.finetune.data`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pairs import encoded, photograph, write

FAST = {"compress_level": 0}


def write_image(path: Path, height: int, width: int) -> Path:
    kind, options = ("PNG", FAST) if path.suffix == ".png" else ("JPEG", {"quality": 95})
    return write(path, encoded(photograph(height, width), kind, **options))


def write_map(path: Path, values: np.ndarray) -> Path:
    return write(path, encoded(values, "PNG", **FAST))


def depth_values(height: int, width: int, metre: int, seed: int = 0) -> np.ndarray:
    """Returns (height, width) uint16 depths of 1 to 5 m, in units of 1 / metre m; a tenth of them is missing (0)."""
    rng = np.random.default_rng(seed)
    values = rng.integers(metre, 5 * metre, (height, width), dtype=np.uint16)
    values[rng.random((height, width)) < 0.1] = 0
    return values


def write_nyu_folders(root: Path) -> Path:
    """Writes BTS's layout: four training pairs in two scenes, two test pairs. Lines of lists end with focal lengths."""
    lines = {"train": [], "test": []}
    for split, base, scenes in (
        ("train", "sync", ("kitchen_0028b", "cafe_0001a")),
        ("test", "official_splits/test", ("bathroom",)),
    ):
        for scene in scenes:
            for number in (0, 45):
                image, depth = f"/{scene}/rgb_{number:05d}.jpg", f"/{scene}/sync_depth_{number:05d}.png"
                write_image(root / base / image[1:], 480, 640)
                write_map(root / base / depth[1:], depth_values(480, 640, 1000, number))
                lines[split].append(f"{image} {depth} 518.8579")
    for split, text in lines.items():
        write(root / f"nyudepthv2_{split}_files_with_gt.txt", "\n".join(text).encode())
    return root


DRIVES = {"train": "2011_09_26_drive_0057_sync", "test": "2011_09_26_drive_0002_sync"}


def write_kitti(root: Path, raw: str = ".", depth: str = "data_depth_annotated/{part}", suffix: str = ".png") -> Path:
    """Writes two pairs of each split, a third image without ground truth, and the lists of BTS."""
    for split, drive in DRIVES.items():
        lines = []
        for number in (69, 54, 75):
            image = f"2011_09_26/{drive}/image_02/data/{number:010d}.png"
            truth = f"{drive}/proj_depth/groundtruth/image_02/{number:010d}.png"
            write_image((root / raw / image).with_suffix(suffix), 375, 1242)
            if number == 75:
                truth = "None"
            else:
                part = {"train": "train", "test": "val"}[split]
                write_map(root / depth.format(part=part) / truth, depth_values(375, 1242, 256 * 6, number))
            lines.append(f"{image} {truth} 721.5377")
        write(root / f"eigen_{split}_files_with_gt.txt", "\n".join(lines).encode())
    return root


def write_ade20k(root: Path) -> Path:
    """Writes two training images and one validation image, of different sizes."""
    folder = root / "ADEChallengeData2016"
    for part, name, size in (
        ("training", "ADE_train_00000001", (20, 30)),
        ("training", "ADE_train_00000002", (24, 18)),
        ("validation", "ADE_val_00000001", (30, 40)),
    ):
        write_image(folder / "images" / part / f"{name}.jpg", *size)
        labels = np.arange(size[0] * size[1]).reshape(size) % 151
        write_map(folder / "annotations" / part / f"{name}.png", labels.astype(np.uint8))
    names = [f"{number}\t0.1\t10\t1\tthing {number}, other name " for number in range(1, 151)]
    write(folder / "objectInfo150.txt", "\n".join(["Idx\tRatio\tTrain\tVal\tName", *names]).encode())
    return root
