"""`python -m sgmim_fast.kernels.tune`: times configurations of the products on this GPU and writes its table.

Never runs by itself. The products of the guidance branch at Swin-B and ViT-B, batches of 8 and 128, are timed with
every candidate; of each precision and shape class the candidate with the least geometric mean over its products is
written to `tuned/sm_XX.json` in this package, which `configs.product` reads before its own table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product as combinations
from unittest import mock

import torch
from torch import Tensor

from sgmim_fast.kernels import configs, products
from sgmim_fast.kernels.configs import Config
from sgmim_fast.kernels.launch import INTERPRETED
from sgmim_fast.ops.target import target

Key = tuple[int, str]  # bytes of an operand's element, shape class
# (rows, in, out): the guidance's and the mergings' linear layers
LAYERS = [
    *((rows, 1024, 4096) for rows in (112, 1792)),
    *((rows, 4096, 1024) for rows in (112, 1792)),
    *((rows, 1024, 1024) for rows in (112, 1792)),
    *((rows, 768, 3072) for rows in (624, 9984)),
    *((rows, 512, 256) for rows in (2832, 45072)),
]


def candidates(element_size: int) -> Iterator[Config]:
    """Those worth a try: tiles of 32 to 256, and warps that leave a thread 16 to 128 sums."""
    wide = (64, 128, 256) if element_size == 2 else (32, 64, 128)
    for m, n, k, warps, stages in combinations((32, 64, 128), wide, (32, 64), (4, 8), (2, 3, 4)):
        if 16 <= m * n // (32 * warps) <= 128 and stages * (m + n) * k * element_size <= 200 << 10:
            yield Config(m, n, k, warps, stages)


def calls(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Key, Callable[[], object]]]:
    """Each product with the class it belongs to: forward, input gradient, weight gradient."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    for rows, inner, outer in LAYERS:
        x, weight, dy = random(rows, inner), random(outer, inner), random(rows, outer)
        kinds = (
            ((rows, outer), lambda x=x, w=weight: products.linears([x], [w])),
            ((rows, inner), lambda dy=dy, w=weight: products.dgrads([dy], [w])),
            ((outer, inner), lambda dy=dy, x=x: products.wgrads([dy], [x], [dy.dtype])),
        )
        for (m, n), call in kinds:
            yield (dtype.itemsize, configs.shape_class(m, n)), call


def tune(
    time: Callable[[Callable[[], object]], float], device: torch.device, report: Callable[[str], None] = print
) -> dict[Key, Config]:
    """The fastest configuration of each key.

    Args:
        time: milliseconds of a call; raises where a configuration does not fit.
        device: where the operands are.
        report: gets a line per key.
    """
    best: dict[Key, Config] = {}
    for dtype in (torch.bfloat16, torch.float32):
        groups = defaultdict(list)
        for key, call in calls(dtype, device):
            groups[key].append(call)
        for key, group in groups.items():
            scores: dict[Config, float] = {}
            for config in candidates(key[0]):
                with mock.patch.object(configs, "product", lambda *_, config=config: config):
                    try:
                        scores[config] = sum(math.log(time(call)) for call in group) / len(group)
                    except Exception as error:  # too much shared memory: the next one
                        report(f"{key} {tuple(config)}: {type(error).__name__}")
            best[key] = min(scores, key=scores.__getitem__)
            report(f"{key}: {tuple(best[key])}, {math.exp(scores[best[key]]):.4f} ms over {len(group)} products")
    return best


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    if INTERPRETED or not torch.cuda.is_available():
        print("torch sees no CUDA device, or TRITON_INTERPRET is set: there is nothing to tune", file=sys.stderr)
        return 2
    from triton.testing import do_bench

    device = torch.device("cuda")
    with mock.patch.object(products, "_wanted", lambda: "triton"):
        best = tune(lambda call: do_bench(call, warmup=5, rep=20, return_mode="median"), device)
    path = configs.TUNED / f"{target(device).architecture}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([[*key, *config] for key, config in best.items()], indent=1) + "\n")
    print(f"written to {path}; takes effect in the next process")
    return 0


if __name__ == "__main__":
    sys.exit(main())
