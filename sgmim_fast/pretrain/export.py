"""`sgmim-fast export`: writes the encoder of a run to a file that timm loads, and a model card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import timm
from safetensors import SafetensorError, safe_open

import sgmim_fast
from sgmim_fast.checkpoints import export_timm
from sgmim_fast.engine.checkpoint import Saved
from sgmim_fast.engine.settings import to_yaml
from sgmim_fast.errors import UserError
from sgmim_fast.exported import tuples
from sgmim_fast.pretrain.build import find, load, normalisation
from sgmim_fast.pretrain.config import Config, Data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of sgmim-fast pretrain")
    parser.add_argument(
        "out", type=Path, metavar="OUT.safetensors", help="file to write; its model card is written to OUT.md"
    )
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="checkpoint to export, best or for example step-00001000 (default: newest)"
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="number of classes of the timm model (default: timm's)"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command. Raises UserError for errors that the user can correct."""
    card = export(find(args.run, args.checkpoint), args.out, args.num_classes)
    print(f"wrote {args.out} and {card}")


def export(saved: Saved, out: Path, num_classes: int | None = None) -> Path:
    """Writes the encoder of a checkpoint to `out` (see `sgmim_fast.checkpoints.export_timm`), and its model card to the
    same path with the suffix .md, which is returned. `num_classes` is the timm model's; None: timm's default.

    Raises:
        UserError: the suffix is not .safetensors, or the file cannot be written.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out} has the ending {out.suffix!r}; expected .safetensors, by which timm knows the format")
    model = load(saved)
    card = out.with_suffix(".md")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        export_timm(model, out, num_classes, **normalisation(saved.config))
        card.write_text(_card(saved, out))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}") from error
    return card


def _card(saved: Saved, out: Path) -> str:
    config, facts = saved.config, saved.facts
    with safe_open(out, "pt") as file:
        given = json.loads(file.metadata()["timm_arguments"])
    call = "".join(f", {name}={value!r}" for name, value in tuples(given).items())
    losses = ", ".join(
        f"{name} {'not known' if facts[key] is None else format(facts[key], '.4f')}"
        for name, key in (("total", "loss"), ("image", "image_loss"), ("structure", "structure_loss"))
    )
    mean, std = (", ".join(f"{number:.6g}" for number in values) for values in normalisation(config).values())
    images = "are RGB" if config.data.image_channels is None else f"have {config.data.image_channels} channels"
    versions = f"sgmim_fast {facts['version']}, torch {facts['torch']}; "
    versions += f"exported with sgmim_fast {sgmim_fast.__version__}, timm {timm.__version__}"
    return f"""# {config.model.encoder}, pre-trained with SG-MIM

`{out.name}` holds the encoder after {facts["step"]} of {facts["steps"]} steps ({facts["epoch"]:.1f} epochs).

```python
import timm

model = timm.create_model("{config.model.encoder}"{call}, checkpoint_path="{out.name}")
```
The classifier in it is zero and has to be trained. For features, another image size or timm's own arguments, let timm
fit the file:

```python
file = dict(file="{out.name}", custom_load=False)
timm.create_model("{config.model.encoder}"{call}, pretrained=True, pretrained_cfg_overlay=file, features_only=True)
```
Images {images}. After scaling integers to [0, 1], they are normalised by the mean {mean} and the standard deviation
{std}.

| | |
|---|---|
| method | SG-MIM, Structured Knowledge Guided Masked Image Modeling (arXiv 2409.02513){_without(config)} |
| recipe | {config.preset or "of its own"}, below |
| data | {_data(config.data)}: {facts["images"]} images in an epoch, {facts["total_batch"]} in a step |
| losses | {losses} (means of the steps before the checkpoint) |
| left out | {facts["skipped_steps"]} steps without a finite loss, {facts["skipped_files"]} broken files |
| versions | {versions} |

```yaml
{to_yaml(config).strip()}
```
"""


def _data(settings: Data) -> str:
    if settings.scenes:
        return "procedural scenes with exact depth"
    if settings.shards is not None:
        return f"shards {settings.shards}"
    if settings.structure is None:
        return f"images of {settings.images}"
    return f"images of {settings.images}, structure maps ({settings.structure_kind}) of {settings.structure}"


def _without(config: Config) -> str:
    if not config.model.visible_only:
        return "" if config.model.guidance else ", without its guidance: SimMIM"
    if not config.model.guidance:
        return ", without its guidance and on visible patches alone: MAE (arXiv 2111.06377)"
    return ", on visible patches alone with a decoder, as MAE (arXiv 2111.06377): not what the paper does"
