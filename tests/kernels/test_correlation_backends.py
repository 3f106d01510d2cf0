"""FeatureCorrelation on backend `cpp` is that on backend `torch`, to the bit. Without a compiler torch meets itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.kernels import FeatureCorrelation, SparseCodes, extension, use_backend
from transcoder.kernels.correlation import torch_backend

CPP = "cpp" if extension.usable() else "torch"


def tensors(node: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, dict):
        for key, part in node.items():
            yield from tensors(part, f"{name}.{key}")


def assert_same(left: FeatureCorrelation, right: FeatureCorrelation) -> None:
    mine, theirs = dict(tensors(left.state_dict())), dict(tensors(right.state_dict()))
    assert mine.keys() == theirs.keys()
    for name, part in mine.items():
        assert part.dtype == theirs[name].dtype, name
        # As bits: -0.0 is not 0.0, and NaN is itself.
        assert torch.equal(
            part.contiguous().view(-1).view(torch.uint8), theirs[name].contiguous().view(-1).view(torch.uint8)
        ), name


def stream(z: Tensor, batch: int, weights: Tensor | None, keep_zeros: bool, **options: object) -> FeatureCorrelation:
    found = FeatureCorrelation(z.shape[1], **options)  # type: ignore[arg-type]
    for a in range(0, z.shape[0], batch):
        part = z[a : a + batch]
        codes = SparseCodes.from_dense(part)
        if keep_zeros:
            every, ptr = torch.arange(part.numel()), torch.arange(0, part.numel() + 1, z.shape[1])
            codes = SparseCodes(part.reshape(-1), every % z.shape[1], ptr, (part.shape[0], z.shape[1]))
        found.update(codes, None if weights is None else weights[a : a + batch])
    return found


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 70),
    d_sae=st.sampled_from([1, 2, 3, 17, 70]),
    batch=st.sampled_from([1, 7, 64]),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    masking=st.sampled_from(["none", "bool", "fp32", "fp64", "nothing"]),
    keep_zeros=st.booleans(),
    halflife=st.sampled_from([None, None, 3.0, 40.0]),
    page=st.sampled_from([5, 1 << 17]),
    seed=st.integers(0, 10**6),
)
def test_cpp_is_torch_to_the_bit(
    tokens: int,
    d_sae: int,
    batch: int,
    density: float,
    dtype: torch.dtype,
    masking: str,
    keep_zeros: bool,
    halflife: float | None,
    page: int,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, d_sae, generator=g, dtype=torch.float64).exp()
    z = (z * (torch.rand(tokens, d_sae, generator=g) < density)).to(dtype)
    draw = (torch.rand(tokens, generator=g, dtype=torch.float64) * 2 - 0.5).clamp_min(0)
    weights = {"none": None, "bool": draw > 0, "fp32": draw.float(), "fp64": draw, "nothing": draw > 9}[masking]
    both = []
    for name in (CPP, "torch"):
        with use_backend(name), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_backend, "PAGE_PAIRS", page)
            both.append(stream(z, batch, weights, keep_zeros, halflife=halflife))
    assert_same(*both)


@pytest.mark.parametrize("count", ["int32", "int64", "decayed"])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_type_of_count_and_number_of_threads(count: str, threads: int) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.rand(600, 200, generator=g) * (torch.rand(600, 200, generator=g) < 0.2)
    both = []
    before = torch.get_num_threads()
    try:
        for name, n in ((CPP, threads), ("torch", 1)):
            torch.set_num_threads(n)
            found = FeatureCorrelation(200, halflife=70.0 if count == "decayed" else None)
            found.tokens_offered = 2**31 - 300 if count == "int64" else 0
            with use_backend(name):
                for a in range(0, 600, 150):
                    found.update(SparseCodes.from_dense(z[a : a + 150]))
            assert found._exact is not None
            assert str(found._exact.joint.dtype) == f"torch.{'float64' if count == 'decayed' else count}"
            both.append(found)
    finally:
        torch.set_num_threads(before)
    assert_same(*both)


def test_backends_may_change_in_the_middle() -> None:
    g = torch.Generator().manual_seed(1)
    z = torch.rand(300, 40, generator=g) * (torch.rand(300, 40, generator=g) < 0.3)
    with use_backend("torch"):
        whole = stream(z, 50, None, False)
    found = FeatureCorrelation(40)
    for n, a in enumerate(range(0, 300, 50)):
        with use_backend((CPP, "torch")[n % 2]):
            found.update(SparseCodes.from_dense(z[a : a + 50]))
    assert_same(found, whole)


@pytest.mark.parametrize("sketch_dim", [None, 24])
def test_what_is_read_does_not_depend_on_the_backend(sketch_dim: int | None) -> None:
    g = torch.Generator().manual_seed(2)
    z = torch.rand(400, 30, generator=g) * (torch.rand(400, 30, generator=g) < 0.3)
    z[:, 4] = z[:, 9]
    i, j = torch.randint(0, 30, (2, 50), generator=g)
    answers = []
    for name in (CPP, "torch"):
        with use_backend(name):
            found = stream(z, 64, None, False, sketch_dim=sketch_dim)
            answers.append(
                [*vars(found.pairs(0.0, 1)).values(), *vars(found.statistics(i, j)).values(), found.counts()]
            )
    for left, right in zip(*answers, strict=True):
        assert torch.equal(left, right)
