"""Pairs per second of one loading process, ours against the fastest plain torchvision pipeline, and times of its steps.

    python benchmarks/bench_loader.py --json benchmarks/results/loader-MACHINE.json

The script generates JPEG photographs (shapes, texture and grain) of ImageNet's usual size and larger ones, and maps as
16-bit PNG, compressed ("png") and as `sgmim-fast structure` writes them ("stored"), and as .npy. Everything runs in one
process on one thread, like a worker of a DataLoader. The pipelines are timed in turn, file by file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tools.measure import machine
from torchvision import io, tv_tensors
from torchvision.transforms import v2

from sgmim_fast import data
from sgmim_fast.data.map_file import encode_png
from sgmim_fast.data.seeds import seeded

SIZES = {"ImageNet": (375, 500), "camera": (1536, 2048)}  # height, width; every other image is in portrait format
MAPS = {"png": "png", "stored": "png", "npy": "npy"}  # kind -> suffix
OUTPUT = 192
COUNT = 24  # number of files of each kind


def photograph(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an enlarged procedural scene with a photograph's grain, (H, W, 3) uint8, and its depth, (H, W) uint16."""
    scene = data.scene.draw_scene(rng)
    scene.noise = 0.0
    colour, depth, _ = data.scene.render(scene, 512, rng)
    part = slice(0, 512 * height // max(height, width)), slice(0, 512 * width // max(height, width))
    large = Image.fromarray(colour.transpose(1, 2, 0)[part]).resize((width, height), Image.Resampling.BICUBIC)
    far = Image.fromarray(depth[part]).resize((width, height), Image.Resampling.BICUBIC)
    coarse = rng.normal(scale=rng.uniform(2, 9), size=(height // 2 + 1, width // 2 + 1, 1))
    grain = coarse.repeat(2, 0).repeat(2, 1)[:height, :width] + rng.normal(scale=2, size=(height, width, 1))
    depth = np.array(far)
    stored = 1 + (depth - depth.min()) / np.ptp(depth) * (2**16 - 2)
    return (np.array(large) + grain).clip(0, 255).astype(np.uint8), stored.astype(np.uint16)


def write_files(folder: Path, kind: str) -> dict[str, float]:
    """Writes images and three kinds of maps under `folder`. Returns their mean sizes in KiB."""
    sizes: dict[str, list[int]] = {}
    for number in range(COUNT):
        rng = np.random.default_rng((0, number))
        height, width = SIZES[kind][:: 1 if number % 2 else -1]
        pixels, depth = photograph(rng, height, width)
        written = [folder / part / f"{number}.{suffix}" for part, suffix in {"images": "jpg", **MAPS}.items()]
        for path in written:
            path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(written[0], quality=int(rng.integers(80, 96)))
        Image.fromarray(depth).save(written[1])
        written[2].write_bytes(encode_png(depth))
        np.save(written[3], depth)
        for path in written:
            sizes.setdefault(path.parent.name, []).append(path.stat().st_size)
    return {part: statistics.mean(found) / 1024 for part, found in sizes.items()}


class Torchvision:
    """The fastest plain torchvision pipeline: its own decoders, uint8 resizing, v2 transforms on the pair."""

    def __init__(self) -> None:
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(OUTPUT, scale=(0.67, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )

    def __call__(self, image: Path, structure: Path | None) -> Any:
        pixels = tv_tensors.Image(io.decode_jpeg(io.read_file(str(image)), io.ImageReadMode.RGB))
        if structure is None:
            return self.transform(pixels)
        if structure.suffix == ".npy":
            stored = torch.from_numpy(np.load(structure))[None]
        else:
            stored = io.decode_png(io.read_file(str(structure)), io.ImageReadMode.UNCHANGED)
        pixels, cut = self.transform(pixels, tv_tensors.Mask(stored.float()))
        return pixels, torch.where(cut != 0, cut / 2**16, torch.nan)


class Ours:
    """The steps of `FolderPairs` for an item."""

    def __init__(self) -> None:
        self.transform = data.PairTransform(OUTPUT)

    def __call__(self, image: Path, structure: Path | None) -> Any:
        files = [data.ImageFile(image)] + ([] if structure is None else [data.StructureFile(structure)])
        with seeded(0, 0, 0):
            return self.transform(*files)


def rates(steps: dict[str, Callable[[int], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """Measures items per second: the quartiles of rounds over all files. The steps are timed in turn, file by file."""
    for step in steps.values():
        step(0)
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, rounds.values())) < 3:
        spent = dict.fromkeys(steps, 0.0)
        for number in range(COUNT):
            for name, step in steps.items():
                start = time.perf_counter()
                step(number)
                spent[name] += time.perf_counter() - start
        for name, total in spent.items():
            rounds[name].append(COUNT / total)
    return {
        name: dict(zip(("p25", "median", "p75"), statistics.quantiles(found, n=4, method="inclusive"), strict=True))
        for name, found in rounds.items()
    }


def parts(folder: Path) -> dict[str, Callable[[int], Any]]:
    """Returns the steps of an item, to be timed separately."""
    transform = data.PairTransform(OUTPUT)
    decoded = [data.ImageFile(folder / "images" / f"{number}.jpg").decode() for number in range(COUNT)]
    with seeded(0):
        small = transform(decoded[0])[0]
    return {
        "decode JPEG": lambda number: data.ImageFile(folder / "images" / f"{number}.jpg").decode(),
        "decode JPEG, scaled": lambda number: data.ImageFile(folder / "images" / f"{number}.jpg").decode(
            OUTPUT / (0.82 * min(decoded[number].shape[1:]))
        ),
        "crop, resize, normalise": lambda number: transform(decoded[number]),
        "normalise": lambda number: transform.normalize(small),
        **{
            f"read map, {kind}": lambda number, kind=kind, suffix=suffix: data.StructureFile(
                folder / kind / f"{number}.{suffix}"
            ).resample((0, 0, 300, 300), OUTPUT)
            for kind, suffix in MAPS.items()
        },
    }


def compare(folder: Path, maps: str, seconds: float) -> dict[str, dict[str, float]]:
    """Measures the rates of both pipelines on the images with one kind of maps, or with "none"."""
    paths = [
        (
            folder / "images" / f"{number}.jpg",
            None if maps == "none" else folder / maps / f"{number}.{MAPS[maps]}",
        )
        for number in range(COUNT)
    ]
    plain, ours = Torchvision(), Ours()
    return rates({"torchvision": lambda n: plain(*paths[n]), "sgmim_fast": lambda n: ours(*paths[n])}, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="time budget per line of the table (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine("cpu"), "output": OUTPUT}
    for kind in SIZES:
        with tempfile.TemporaryDirectory() as name:
            kib = write_files(Path(name), kind)
            print(f"{kind}: mean KiB", ", ".join(f"{part} {size:.0f}" for part, size in kib.items()))
            found = {maps: compare(Path(name), maps, args.seconds) for maps in ("none", *MAPS)}
            for maps, rate in found.items():
                a, b = (rate[pipeline]["median"] for pipeline in ("torchvision", "sgmim_fast"))
                print(f"  maps {maps:7} torchvision {a:6.0f}/s  sgmim_fast {b:6.0f}/s  {b / a:.2f}x")
            alone = {part: 1e3 / rate["median"] for part, rate in rates(parts(Path(name)), args.seconds).items()}
            print("  alone:", ", ".join(f"{part} {ms:.2f} ms" for part, ms in alone.items()), flush=True)
        results[kind] = {"kib": kib, "items_per_second": found, "parts_ms": alone}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
