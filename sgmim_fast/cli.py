"""The console command `sgmim-fast`.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int | None`. It is imported only when it is
called, so that `sgmim-fast env` works without any of the extras.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import sgmim_fast
from sgmim_fast.errors import UserError, nearest

# name -> module, description, required extra of the package
COMMANDS = {
    "env": ("sgmim_fast.env", "print versions, the machine, and why a backend is missing", ""),
    "pretrain": ("sgmim_fast.pretrain.task", "pre-train an encoder on images and structure maps", "train"),
    "tune": ("sgmim_fast.pretrain.tune", "measure which kernels are fastest on this machine, and select them", "train"),
    "data": ("sgmim_fast.data.check", "check a data set, or measure its mean and standard deviation", "train"),
    "structure": ("sgmim_fast.data.depth_maps", "predict structure maps for a folder of images", "structure"),
    "reconstruct": ("sgmim_fast.pretrain.pictures", "draw what a pre-trained model reconstructs", "train"),
    "finetune": ("sgmim_fast.finetune.task", "fine-tune an encoder for depth or segmentation", "downstream"),
    "evaluate": ("sgmim_fast.finetune.evaluate", "compute the metrics of a fine-tuned model", "downstream"),
    "export": ("sgmim_fast.pretrain.export", "write a run's encoder to a file that timm loads", "train"),
    "fourier": ("sgmim_fast.fourier.command", "compare the frequencies in the feature maps of encoders", "downstream"),
}


class Parser(argparse.ArgumentParser):
    """ArgumentParser that reports errors in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (--help shows the usage)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code. Errors that the user can correct print one line and return 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser("sgmim-fast", description="SG-MIM pre-training, from photographs to an encoder.")
    parser.add_argument("--version", action="version", version=f"sgmim_fast {sgmim_fast.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=bool(argv))
    asked = next((argument for argument in argv if not argument.startswith("-")), None)
    if asked is not None and asked not in COMMANDS:
        parser.error(f"unknown command {asked!r}; expected one of {', '.join(COMMANDS)}{nearest(asked, COMMANDS, 1)}")
    try:
        for name, (path, what, _) in COMMANDS.items():
            subparser = subparsers.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
            if name == asked:
                module = importlib.import_module(path)
                module.add_arguments(subparser)
        args = parser.parse_args(argv)
        if asked is None:
            parser.print_help()
            return 0
        return module.run(args) or 0
    except ModuleNotFoundError as error:
        extra = COMMANDS[asked][2]
        if not extra or (error.name or "").startswith("sgmim_fast"):
            raise
        print(
            f"sgmim-fast {asked}: the package {error.name!r} is missing: pip install 'sgmim_fast[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except ValueError as error:
        if not isinstance(error, _shown()):
            raise
        print(f"sgmim-fast {asked}: {_rank()}{_line(str(error))}", file=sys.stderr, flush=True)
        return 2


def _shown() -> tuple[type[Exception], ...]:
    """Returns the errors that are printed in one line. `DataError` is included once the data module is imported."""
    data = sys.modules.get("sgmim_fast.data")
    return (UserError,) if data is None else (UserError, data.DataError)


def _line(message: str) -> str:
    """Returns a message as one line. For errors of loader workers PyTorch adds a traceback that ends in the message."""
    if "\nOriginal Traceback" in message:
        message = message.rstrip().splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())


def _rank() -> str:
    """Returns a prefix with the rank of the process; "" for the first one."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank}: "


if __name__ == "__main__":
    sys.exit(main())
