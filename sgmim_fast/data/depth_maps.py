"""Generates structure maps for a folder of images with a depth-estimation model.

`generate` writes a mirrored tree of 16-bit PNG files for `data.FolderPairs`, and a JSON file about their origin.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

try:
    import transformers
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "sgmim_fast.data.depth_maps needs transformers, which is not installed: pip install 'sgmim_fast[structure]'",
        name="transformers",
    ) from None
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    BaseImageProcessor,
    PreTrainedModel,
)

import sgmim_fast
from sgmim_fast.data.files import find_files
from sgmim_fast.data.image_file import IMAGE_SUFFIXES, ImageFile
from sgmim_fast.data.map_file import encode_png
from sgmim_fast.data.report import BrokenFile, DataError, some

MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
PROVENANCE = "structure.json"
LARGEST = 2**16 - 1
MAX_BUFFERED = 4  # batches of images that may be buffered until enough images of equal size have come
SCALING = (
    "each map on its own: its least value is stored as 1, its greatest as 65535, linearly between; both are in the "
    "file's text chunk 'range'. 0 is not used: it means 'no value'. sgmim_fast.data divides by 65536."
)
INVERSE, METRIC = "relative inverse depth, larger is nearer", "depth, larger is farther"


@dataclass
class Generated:
    """Results of `generate`."""

    written: int = 0  # number of maps written
    kept: int = 0  # number of maps that existed already
    broken: dict[str, str] = field(default_factory=dict)  # image without a map -> reason

    def summary(self) -> str:
        """Returns the results as one line."""
        names = some([f"{name} ({reason})" for name, reason in self.broken.items()])
        return (
            f"{self.written} maps written, {self.kept} kept, {len(self.broken)} broken images"
            f"{': ' + names if names else ''}"
        )


def generate(
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] = MODEL,
    batch: int = 8,
    device: str = "auto",
    *,
    revision: str | None = None,
    workers: int = 0,
    compression: int = 0,
    progress: bool = False,
) -> Generated:
    """Predicts a map for every image of a folder tree, and writes it to `out` as a 16-bit PNG under the same relative
    path.

    Existing maps are kept and files are written atomically, so an interrupted call can be repeated.
    `out`/structure.json names the model and explains the values. Broken images are skipped and listed in the result.

    Args:
        images: folder of images in any format of `data.IMAGE_SUFFIXES`, searched recursively.
        out: folder for the maps, not inside `images`; created if it does not exist.
        model: name of a depth-estimation model on huggingface.co, or a folder written by `save_pretrained`.
        batch: batch size. Only images of equal size after preprocessing form a batch.
        device: a torch device. "auto": a GPU if available.
        revision: branch, tag or commit of the model's repository.
        workers: number of data loader workers.
        compression: zlib level of the PNG, 0 to 9. Uncompressed maps are up to several times as large, and load far
            faster (benchmarks/NOTES.md, "Loading").
        progress: shows a progress bar.

    Returns:
        The numbers of maps written and kept, and the broken images.

    Raises:
        DataError: there are no images, the model cannot be loaded, or `out` has maps of another model.
    """
    images, out = Path(images), Path(out)
    found = find_files(images, "images", IMAGE_SUFFIXES)
    if out.resolve().is_relative_to(images.resolve()):
        raise DataError(f"out is {out}, which is inside images, {images}; expected a separate folder")
    if batch < 1 or not 0 <= compression <= 9:
        raise DataError(f"batch is {batch} and compression is {compression}; expected at least 1, and 0 to 9")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    processor, network = _load(os.fspath(model), revision)
    network.to(device).eval()
    result = Generated()
    note = _provenance(os.fspath(model), network, device)
    _check_provenance(out / PROVENANCE, note)

    todo = []
    for stem, suffixes in found.items():
        result.broken |= {stem + other: f"its map would be that of {stem + suffixes[0]}" for other in suffixes[1:]}
        if (out / (stem + ".png")).exists():
            result.kept += 1
        else:
            todo.append(stem + suffixes[0])
    _write(out / PROVENANCE, json.dumps(note, indent=2).encode())
    prepared = DataLoader(Prepared(images, todo, processor), batch_size=None, num_workers=workers)
    shown = tqdm(prepared, total=len(todo), unit="image", disable=not progress)
    for group in _groups(shown, batch, result):
        for prediction, (name, *_) in zip(_predict(network, processor, group, device), group, strict=True):
            if not prediction.isfinite().all():
                result.broken[name] = "the model's prediction is not finite"
                continue
            _write((out / name).with_suffix(".png"), _png(prediction.numpy(), compression))
            result.written += 1
    note |= {"maps": result.written + result.kept, "broken": result.broken}
    _write(out / PROVENANCE, json.dumps(note, indent=2).encode())
    return result


def _load(model: str, revision: str | None) -> tuple[BaseImageProcessor, PreTrainedModel]:
    try:
        given = {"revision": revision, "trust_remote_code": False}
        AutoConfig.from_pretrained(model, **given)  # first, since its error messages are the clearest
        processor = AutoImageProcessor.from_pretrained(model, **given)
        return processor, AutoModelForDepthEstimation.from_pretrained(model, weights_only=True, **given)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        if Path(model).is_dir():
            raise DataError(
                f"{model} has no depth-estimation model ({reason}); expected config.json, preprocessor_config.json and "
                "model.safetensors as save_pretrained writes them"
            ) from error
        raise DataError(
            f"no weights of {model} here ({reason}); download config.json, preprocessor_config.json and "
            f"model.safetensors from https://huggingface.co/{model} into a folder, and give that folder as the model"
        ) from error


def _provenance(model: str, network: PreTrainedModel, device: str) -> dict[str, Any]:
    config = network.config
    relative = getattr(config, "depth_estimation_type", "relative") == "relative"
    known = config.model_type in ("depth_anything", "dpt")
    return {
        "model": model,
        "revision": getattr(config, "_commit_hash", None),
        "class": type(network).__name__,
        "values": INVERSE if relative and known else METRIC,
        "scaling": SCALING,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(device),
        "versions": {
            "sgmim_fast": sgmim_fast.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def _check_provenance(path: Path, note: dict[str, Any]) -> None:
    """Raises DataError if existing maps were made by another model."""
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({error}); expected the file of an earlier run, or none") from error
    for key in ("model", "revision"):
        if before.get(key) != note[key]:
            raise DataError(
                f"{path.parent} has maps of {key} {before.get(key)}, not {note[key]}; expected the same model, or "
                "another folder"
            )


class Prepared(Dataset):
    """Map-style data set of preprocessed images: (name, pixel values or error message, (height, width))."""

    def __init__(self, root: Path, names: list[str], processor: BaseImageProcessor):
        self.root, self.names, self.processor = root, names, processor

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str, tuple[int, int]]:
        name = self.names[index]
        try:
            image = ImageFile(self.root / name).decode()
        except BrokenFile as broken:
            return name, broken.reason, (0, 0)
        image = F.to_dtype_image(image, torch.uint8, scale=True)  # the processor rescales by 1 / 255
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return name, pixels, tuple(image.shape[-2:])


Group = list[tuple[str, Tensor, tuple[int, int]]]


def _groups(
    prepared: Iterable[tuple[str, Tensor | str, tuple[int, int]]], batch: int, result: Generated
) -> Iterator[Group]:
    """Yields lists of up to `batch` images of equal shape; adds broken images to `result`."""
    buffered: dict[torch.Size, Group] = {}
    for name, pixels, size in prepared:
        if isinstance(pixels, str):
            result.broken[name] = pixels
            continue
        group = buffered.setdefault(pixels.shape, [])
        group.append((name, pixels, size))
        if len(group) == batch:
            yield buffered.pop(pixels.shape)
        elif sum(map(len, buffered.values())) >= MAX_BUFFERED * batch:
            yield buffered.pop(max(buffered, key=lambda shape: len(buffered[shape])))
    yield from buffered.values()


@torch.inference_mode()
def _predict(network: PreTrainedModel, processor: BaseImageProcessor, group: Group, device: str) -> list[Tensor]:
    """Predicts a map of each image, at the image's size."""
    outputs = network(pixel_values=torch.stack([pixels for _, pixels, _ in group]).to(device))
    sizes = [size for _, _, size in group]
    resize = processor.post_process_depth_estimation
    source = {"source_sizes": sizes} if "source_sizes" in inspect.signature(resize).parameters else {}  # crops padding
    return [result["predicted_depth"].float().cpu() for result in resize(outputs, target_sizes=sizes, **source)]


def _png(prediction: np.ndarray, compression: int) -> bytes:
    least, greatest = float(prediction.min()), float(prediction.max())
    share = (prediction.astype(np.float64) - least) / max(greatest - least, np.finfo(np.float32).tiny)
    stored = (1 + (share * (LARGEST - 1)).round()).astype(np.uint16)
    return encode_png(stored, compression=compression, text={"range": f"{least!r} {greatest!r}"})


def _write(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command `sgmim-fast structure`."""
    parser.add_argument("images", type=Path, help="folder of images, searched recursively")
    parser.add_argument(
        "out", type=Path, help="output folder of the maps; running the command again continues where it stopped"
    )
    parser.add_argument(
        "--model", default=MODEL, help="model name on huggingface.co, or local folder (default: %(default)s)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model on huggingface.co")
    parser.add_argument("--batch", type=int, default=8, help="batch size (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: cuda if available)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    parser.add_argument(
        "--compression",
        type=int,
        default=0,
        help="compression level of the PNG files, 0 to 9; 0 loads fastest (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command `sgmim-fast structure`."""
    result = generate(**vars_of(args), progress=sys.stderr.isatty())
    print(f"{result.summary()}; see {args.out / PROVENANCE}")


def vars_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments that `add_arguments` adds, without the parser's other ones."""
    names = ("images", "out", "model", "revision", "batch", "device", "workers", "compression")
    return {name: getattr(args, name) for name in names}
