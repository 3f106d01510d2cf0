"""What bench.science holds the monitor against: its own two-pass correlation, and tokens drawn without repetition."""

from __future__ import annotations

import pytest
import torch

from bench.science.planted import Stream, distinct
from bench.science.s0_monitor import two_pass
from transcoder.kernels.correlation.reference import correlation_reference


@pytest.mark.parametrize("newest", [None, 12000, 8192, 500])
def test_the_sparse_two_pass_is_the_dense_one(newest: int | None) -> None:
    stream = Stream(replicas=1, tokens=8192, blocks=2, seed=1)
    blocks = [stream.block(n) for n in range(2)]
    z = torch.cat([block.to_dense() for block in blocks])
    g = torch.Generator().manual_seed(0)
    planted, strangers = torch.arange(0, 2 * stream.pairs, 2), torch.randint(0, stream.d_sae, (2, 200), generator=g)
    strangers[0, :20] = stream.d_sae - 1  # the always-on latent
    i, j = torch.cat([planted, strangers[0]]), torch.cat([planted + 1, strangers[1]])
    truth = correlation_reference(z if newest is None else z[-newest:]).correlation[i, j]
    if newest == 500:
        assert bool((truth == 0).any())  # rare latents that are silent there
    torch.testing.assert_close(two_pass(blocks, i, j, newest), truth, rtol=0, atol=1e-12)


def test_draws_are_uniform_and_never_twice_in_a_row() -> None:
    drawn = distinct(2000, 45, 50, torch.Generator().manual_seed(2))
    assert drawn.shape == (2000, 45)
    ordered = drawn.sort(1).values
    assert bool((ordered.diff() > 0).all())
    assert (int(ordered.min()), int(ordered.max())) == (0, 49)
    # Uniform in every column, redrawn ones too: a mean of 2000 draws has a standard error of 0.32.
    assert float((drawn.double().mean(0) - 24.5).abs().max()) < 1.5
    again = distinct(2000, 45, 50, torch.Generator().manual_seed(2))
    assert torch.equal(drawn, again)
