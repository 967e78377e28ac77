from __future__ import annotations

import golden
import pytest
import torch
from checks import assert_close_to_truth, layouts
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops.standardize_structure import standardize_structure

NAN, INF = torch.nan, torch.inf
# ties, both zeros, denormals, neighbours, and magnitudes far apart
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-40, -1e-40, 1.0, 1.0000001, -1.0, 0.1, 3.3, 1e6, -1e6]),
    st.floats(-1e3, 1e3, width=32),
)


def sorting(structure: Tensor) -> Tensor:
    """Implements SPEC, "Standardising the structure map", literally, in the dtype of the map."""
    out = torch.zeros_like(structure)
    for source, target in zip(structure.flatten(0, 1), out.flatten(0, 1), strict=True):
        ordered = source.flatten().sort().values
        trimmed = ordered[int(0.1 * len(ordered)) : int(0.9 * len(ordered))]
        if len(trimmed) >= 2:
            target.copy_((source - trimmed.mean()) / (trimmed.var() + 1e-6).sqrt())
    return out


def check(structure: Tensor, device: torch.device) -> None:
    actual = standardize_structure(structure.to(device))
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    assert_close_to_truth(actual, sorting(structure.float()), sorting(structure.double()))


@pytest.mark.parametrize("case", golden.cases("standardize"), ids=lambda case: case["salt"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_golden(place, case, dtype, rtol):
    depth = golden.depth(case)
    if not backends.can_run("standardize_structure", place.backend, depth.to(place.device, dtype))[0]:
        pytest.skip("float64 has a plain implementation only")
    out = standardize_structure(depth.to(place.device, dtype))
    assert out.dtype == dtype
    golden.assert_statistics(out, case["out"], rtol)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 12), st.integers(1, 12)),
    pool=st.lists(VALUES, min_size=1, max_size=40),
    number=st.integers(0, 2**31),
)
def test_against_sorting(place, shape, pool, number):
    choice = torch.randint(len(pool), shape, generator=torch.Generator().manual_seed(number))
    check(torch.tensor(pool)[choice], place.device)


DISTRIBUTIONS = {
    "gamma": lambda: torch.distributions.Gamma(2.0, 1.0).sample((2, 1, 61, 77)),
    "one bin": lambda: 1 + torch.rand(2, 1, 61, 77) / 8,  # every value has the same upper 11 bits
    "last digit": lambda: (1.5 + torch.randint(4, (2, 1, 61, 77)) * 2**-23).float(),
    "far from zero": lambda: 1e4 + torch.randn(2, 1, 61, 77),
    "two values": lambda: torch.where(torch.rand(2, 1, 61, 77) < 0.5, -3.0, 7.0),
    "outliers": lambda: torch.randn(2, 1, 61, 77) ** 15,
    "denormal": lambda: torch.randn(2, 1, 61, 77) * 1e-39,
    "integers": lambda: torch.randint(-300, 300, (2, 1, 61, 77)).float(),
    "one row": lambda: torch.randn(1, 1, 1, 8191),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions(device, name):
    check(DISTRIBUTIONS[name](), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_converted_first(device, dtype):
    check(torch.randn(2, 1, 33, 35).to(dtype), device)


def test_uint16_is_divided_by_two_to_the_sixteen(device):
    numbers = torch.randint(0, 2**16, (2, 1, 33, 35))
    check(numbers.float() / 2**16, device)
    expected = standardize_structure((numbers.float() / 2**16).to(device))
    assert torch.equal(standardize_structure(numbers.to(torch.uint16).to(device)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -2.5, 0.1, 1e30])
def test_constant_gives_zeros(place, dtype, value):
    structure = torch.full((2, 1, 31, 33), value, dtype=dtype, device=place.device)
    if not backends.can_run("standardize_structure", place.backend, structure)[0]:
        pytest.skip("float64 has a plain implementation only")
    assert not standardize_structure(structure).any()


@pytest.mark.parametrize("pixels", [1, 2])
def test_fewer_than_two_kept_values_give_zeros(device, pixels):
    assert not standardize_structure(torch.randn(2, 1, 1, pixels, device=device)).any()


def test_five_pixels_keep_the_lower_four(device):
    structure = torch.tensor([4.0, 1.0, 100.0, 3.0, 2.0], device=device).view(1, 1, 1, 5)
    expected = (structure - 2.5) / (5 / 3 + 1e-6) ** 0.5
    torch.testing.assert_close(standardize_structure(structure), expected)


def test_nonfinite_raises(device):
    structure = torch.randn(3, 2, 9, 9, device=device)
    structure[0, 0, 0, 0] = NAN
    structure[2, 0, 3, 3], structure[2, 1, 4, 4], structure[2, 1, 5, 5] = INF, -INF, -NAN
    with pytest.raises(ValueError, match="1 in image 0, 3 in image 2; expected finite"):
        standardize_structure(structure)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    share=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    number=st.integers(0, 2**31),
)
def test_nonfinite_ignored(place, shape, share, number):
    """The finite values are standardised as if there were no others."""
    generator = torch.Generator().manual_seed(number)
    structure = torch.randn(shape, generator=generator)
    bad = torch.rand(shape, generator=generator) < share
    structure[bad] = torch.tensor([NAN, -NAN, INF, -INF])[torch.randint(4, shape, generator=generator)][bad]
    actual = standardize_structure(structure.to(place.device), nonfinite="ignore").cpu()
    assert not actual[bad].any()
    for result, plane, good in zip(*(t.flatten(0, 1) for t in (actual, structure, ~bad)), strict=True):
        if good.any():
            alone = plane[good].view(1, 1, 1, -1)
            assert_close_to_truth(result[good].view_as(alone), sorting(alone), sorting(alone.double()))


def test_channels_and_images_are_independent(device):
    structure = torch.randn(2, 3, 17, 19, device=device) * torch.tensor([1.0, 10, 100], device=device).view(3, 1, 1)
    together = standardize_structure(structure)
    for image in range(2):
        for channel in range(3):
            alone = standardize_structure(structure[image, channel][None, None])
            assert torch.equal(together[image, channel], alone[0, 0])


def test_layouts(device):
    for name, structure in layouts(torch.randn(2, 2, 13, 15, device=device)).items():
        expected = standardize_structure(structure.contiguous())
        assert torch.equal(standardize_structure(structure), expected), name


def test_same_bits_each_time_and_with_any_number_of_threads(device, threads):
    structure = torch.randn(5, 1, 64, 64, device=device)
    results = []
    for number in (1, 1, 2):
        with threads(number):
            results.append(standardize_structure(structure))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_autocast_changes_nothing(device):
    structure = torch.randn(2, 1, 8, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        actual = standardize_structure(structure)
    assert torch.equal(actual, standardize_structure(structure))


def test_compile(device):
    structure = torch.randn(2, 1, 16, 16, device=device)

    def function(structure):
        return standardize_structure(structure + 1) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(structure), function(structure))
    structure[0, 0, 0, 0] = NAN
    with pytest.raises(ValueError, match="1 in image 0"):
        compiled(structure)


@pytest.mark.parametrize(
    ("structure", "error", "message"),
    [
        (torch.zeros(3, 4, 4), ValueError, r"structure has shape \(3, 4, 4\); expected \(B, S, H, W\)"),
        (torch.zeros(0, 1, 4, 4), ValueError, "at least one image"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int32), TypeError, "structure has dtype torch.int32"),
        (torch.zeros(1, 1, 4, 4, requires_grad=True), ValueError, "structure requires grad"),
    ],
)
def test_bad_input(structure, error, message):
    with pytest.raises(error, match=message):
        standardize_structure(structure)


def test_unknown_treatment():
    with pytest.raises(ValueError, match="nonfinite is 'drop'"):
        standardize_structure(torch.zeros(1, 1, 4, 4), nonfinite="drop")
