"""What the CUDA backend refuses, and why. On a GPU also errors of its launchers, called without the ops' checks."""

from __future__ import annotations

import re

import pytest
import torch

from sgmim_fast import _native, backends, ops
from sgmim_fast.ops.cuda import masked_patch_embed, selective_mask, standardize_structure
from sgmim_fast.ops.masked_patch_embed import Arguments

needs_gpu = pytest.mark.skipif(not backends.available()["cuda"][0], reason=backends.available()["cuda"][1])


@pytest.mark.parametrize(
    ("module", "args", "reason"),
    [
        (selective_mask, (None, [1], 129, 128, 1), "16512 units per image; the CUDA kernel holds at most 16384"),
        (selective_mask, (None, [1], 128, 128, 363), "2^31 cells per image or more"),
        (standardize_structure, (torch.zeros(1, 1, 2, 2, dtype=torch.float64), False), "dtype torch.float64"),
        (standardize_structure, (torch.zeros(1).expand(1, 1, 2**16, 2**15), False), "a map of 2^31 - 4096 values"),
    ],
)
def test_reasons(module, args, reason):
    usable, actual = module.can_run("forward", args)
    assert not usable and reason in actual


def test_limits_themselves_are_taken():
    assert selective_mask.can_run("forward", (None, [1], 128, 128, 362))[0]
    assert standardize_structure.can_run("forward", (torch.zeros(1, 1, 2, 2, dtype=torch.uint16), False))[0]


def test_masked_patch_embed_names_dtype_and_width():
    if not _native.load_cuda()[0]:
        pytest.skip(_native.load_cuda()[1])

    def check(width: int, dtype: torch.dtype, reason: str) -> None:
        images, weight = torch.zeros(1, 3, 4, 4, dtype=dtype), torch.zeros(width, 3, 4, 4)
        usable, said = masked_patch_embed.can_run("forward", Arguments(images, weight, *[None] * 7))
        assert usable == (not reason) and (usable or said == reason)

    check(6144, torch.float32, "")
    check(768, torch.float16, "")
    check(6145, torch.float32, "rows of 6145 numbers; the CUDA kernel sums at most 6144 in shared memory")
    check(768, torch.float64, "dtype torch.float64; the CUDA kernels take float32, bfloat16, float16")


def test_every_row_is_in_a_part_of_the_sums():
    if not _native.load_cuda()[0]:
        pytest.skip(_native.load_cuda()[1])
    parts = torch.ops.sgmim_fast_cuda.place_tokens_parts
    assert [parts(rows, 128) for rows in (0, 1, 512, 513, 1024, 294912)] == [0, 1, 512, 257, 512, 512]


def call_of(op: str):
    """Returns a call of the op, and tensors for it."""
    rows = torch.tensor([0, 3])
    if op == "gather_patches":
        return lambda **t: ops.gather_patches(**t, cell=4, patch=4), {"pixels": torch.zeros(1, 1, 8, 8), "rows": rows}
    if op == "masked_patch_embed":
        vectors = {name: torch.zeros(5) for name in ("bias", "mask_token", "norm_weight", "norm_bias")}
        images = {"x": torch.zeros(1, 3, 8, 8), "weight": torch.zeros(5, 3, 4, 4)}
        return ops.masked_patch_embed, images | vectors | {"visible": rows}
    head = {"x": torch.zeros(2, 6), "weight": torch.zeros(16, 6), "bias": torch.zeros(16), "rows": rows}
    pixels = {"target": torch.zeros(1, 1, 8, 8), "valid": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    return lambda **t: ops.linear_l1(**t, cell=4), head | pixels


@pytest.mark.parametrize("op", ["gather_patches", "masked_patch_embed", "linear_l1"])
def test_a_tensor_on_another_device_than_its_neighbours_is_named(op):
    """Does not depend on the backend. The device of the first argument is expected of all others."""
    call, tensors = call_of(op)
    call(**tensors)
    first, *others = tensors
    for name in others:
        with pytest.raises(ValueError, match=f"^{name} is on meta; expected cpu, where the other arguments are"):
            call(**tensors | {name: tensors[name].to("meta")})
    with pytest.raises(ValueError, match="is on cpu; expected meta, where the other arguments are"):
        call(**tensors | {first: tensors[first].to("meta")})


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_gpu_that_the_library_has_no_code_for(monkeypatch, part):
    """If the backend is forced, the error states the GPU and the library's architectures; if not, another one runs."""
    if not _native.load_cuda()[0]:
        pytest.skip(_native.load_cuda()[1])
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": {"architectures": "8.0;9.0;10.0+PTX"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    found = {"cuda": backends._cuda(), "triton": (False, "made up"), "torch": (True, "")}
    monkeypatch.setattr(backends, "available", lambda: found)
    message = "the GPU has compute capability 7.5, the CUDA library is built for 8.0;9.0;10.0+PTX: install sgmim_fast"
    for op, modules in backends.MODULES.items():
        if "cuda" not in modules or (op, part) not in backends._plain:
            continue
        with backends.use("cuda"), pytest.raises(RuntimeError, match=f"cannot run {op}: .*{re.escape(message)}"):
            backends.choose(op, part, "cuda", ())
        assert backends.choose(op, part, "cuda", ()) == backends.implementation(op, part, "torch")


def test_attention_memory_is_that_of_the_notes():
    if not _native.load_cuda()[0]:
        pytest.skip(_native.load_cuda()[1])
    memory = torch.ops.sgmim_fast_cuda.attention_memory
    assert memory(2, 128, False) < memory(4, 128, False) < memory(4, 128, True) <= 163 << 10  # the limit of an A100
    assert memory(2, 128, True) <= 99 << 10


@pytest.mark.gpu
@needs_gpu
def test_launchers_name_what_is_wrong():
    seed = torch.zeros(2, dtype=torch.int64, device="cuda")
    good = {
        "mask": torch.empty(3, 2, 2, dtype=torch.bool, device="cuda"),
        "visible": torch.empty(6, dtype=torch.int64, device="cuda"),
        "visible_offsets": torch.empty(4, dtype=torch.int64, device="cuda"),
        "masked_rows": torch.empty(6, dtype=torch.int64, device="cuda"),
        "masked_offsets": torch.empty(4, dtype=torch.int64, device="cuda"),
    }
    draw = torch.ops.sgmim_fast_cuda.selective_mask
    draw(seed, 2, 2, 2, 1, *good.values())
    for change, message in (
        ({"mask": good["mask"].cpu()}, "mask must be on GPU 0"),
        ({"visible": good["visible"].int()}, "the visible rows must be Long, got Int"),
        ({"masked_rows": good["masked_rows"][:5]}, "the masked rows must be contiguous and have 6 values, got 5"),
    ):
        with pytest.raises(RuntimeError, match=message):
            draw(seed, 2, 2, 2, 1, *(good | change).values())
    with pytest.raises(RuntimeError, match="a grid of 1 x 16385 units; the CUDA kernel holds at most 16384"):
        draw(seed, 2, 1, 16385, 1, *good.values())
    assert torch.isfinite(ops.standardize_structure(torch.randn(1, 1, 8, 8, device="cuda"))).all()  # the GPU works


@pytest.mark.gpu
@needs_gpu
def test_a_launch_too_large_is_named():
    """2^25 parts of the rows, 64 heads and 2 images need 2^32 blocks. The launch is refused before tensors are read."""
    q, k = torch.zeros(1, 64, device="cuda"), torch.zeros(1, 64, device="cuda")
    offsets = torch.zeros(3, dtype=torch.int64, device="cuda")
    lse = torch.zeros(2, 64, device="cuda")
    with pytest.raises(RuntimeError, match="a launch of 4294967296 blocks; CUDA takes less than 2"):
        torch.ops.sgmim_fast_cuda.attention(q, k, k, offsets, offsets, q.clone(), lse, 2**30, 64, True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_another_gpu():
    pixels = torch.zeros(1, 1, 8, 8, device="cuda:0")
    with pytest.raises(ValueError, match="rows is on cuda:1; expected cuda:0"):
        ops.gather_patches(pixels, torch.zeros(1, dtype=torch.int64, device="cuda:1"), cell=4, patch=4)
    with backends.use("cuda"):
        packed = ops.gather_patches(pixels.to("cuda:1"), torch.tensor([1], device="cuda:1"), cell=4, patch=4)
    assert packed.device == torch.device("cuda:1")
