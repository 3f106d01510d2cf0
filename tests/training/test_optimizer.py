"""The optimizer step: PyTorch's Adam by backend `torch`, one fused op by backend `cpp`, both against float64. Without a
compiler `cpp` is torch again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from transcoder.config import TrainingSection
from transcoder.kernels import extension, use_backend
from transcoder.kernels.adam import cpp_backend
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.optimizer import make_optimizer, optimizer_step

CPP = "cpp" if extension.usable() else "torch"
EPS = torch.finfo(torch.float32).eps


class Trained:
    """A model and its optimizer, fed the same gradients every time it is made."""

    def __init__(self, backend: str, dtype: torch.dtype = torch.float32, d_out: int = 37, skip: bool = True) -> None:
        config = TranscoderConfig(20, d_out, 700, 4, widths=(700,), skip=skip)
        self.model = Transcoder(config, seed=1).to(dtype)
        if dtype == torch.float64:
            self.model.normalize_decoder()
        self.optimizer = make_optimizer(self.model, TrainingSection(), 1e-2)
        self.backend, self.generator, self.norms = backend, torch.Generator().manual_seed(3), list[Tensor]()

    def run(self, steps: int, clip: float | None = 1.0, scale: float = 1.0) -> Trained:
        for step in range(steps):
            for p in self.model.parameters():
                g = torch.randn(p.shape, generator=self.generator) * scale * 10.0**-step
                p.grad = g.to(p.dtype)
            with use_backend(self.backend):
                self.norms.append(optimizer_step(self.model, self.optimizer, 1e-2 / (1 + step), clip))
        return self

    def tensors(self) -> list[Tensor]:
        """Parameters, moments, counts, norms."""
        states = [self.optimizer.state[p] for p in self.model.parameters()]
        moments = [s[name] for name in ("step", "exp_avg", "exp_avg_sq") for s in states]
        return [*(p.detach() for p in self.model.parameters()), *moments, *self.norms]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_close(found: list[Tensor], exact: list[Tensor], ulps: float) -> None:
    """Within `ulps` of the largest number. One element in 5000 may be off by 50 times that: where a gradient's tangent part
    all but cancels, Adam divides its rounding by something as small."""
    for a, b in zip(found, exact, strict=True):
        off = (a.double() - b.double()).abs() / (EPS * float(b.abs().max()))
        assert float(off.max()) <= 50 * ulps
        assert int((off > ulps).sum()) <= off.numel() / 5000


@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize(("clip", "scale"), [(1.0, 1.0), (None, 1.0), (1e6, 1e-3), (1.0, 1e-9)])
@pytest.mark.parametrize("d_out", [1, 37, 300])
def test_it_agrees_with_adam_in_float64(backend: str, clip: float | None, scale: float, d_out: int) -> None:
    """Each step rounds a number about ten times; four steps stay within 40 units in the last place."""
    found = Trained(backend, d_out=d_out).run(4, clip, scale)
    exact = Trained("torch", torch.float64, d_out=d_out)
    exact.model.load_state_dict({n: t.double() for n, t in Trained("torch", d_out=d_out).model.state_dict().items()})
    exact.run(4, clip, scale)
    if d_out > 1:  # A row of one number is +-1: its gradient has no tangent part but rounding.
        assert_close(found.tensors(), exact.tensors(), 40)
    else:
        assert torch.equal(found.model.W_dec.abs().detach(), torch.ones(700, 1))
    length = found.model.W_dec.detach().double().norm(dim=1)
    torch.testing.assert_close(length, torch.ones_like(length), rtol=0, atol=4 * EPS)


def test_float64_parameters() -> None:
    assert_close(Trained(CPP, torch.float64).run(3).tensors(), Trained("torch", torch.float64).run(3).tensors(), 1e-6)


def test_the_number_of_threads_never_shows(threads: None) -> None:
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(Trained(CPP, d_out=300).run(3).tensors())
    if CPP == "cpp":
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("before", "after"), [("torch", CPP), (CPP, "torch")])
def test_the_state_goes_from_one_backend_to_the_other(before: str, after: str) -> None:
    """As a checkpoint carries it: by state_dict."""
    first = Trained(before).run(2)
    state, weights = first.optimizer.state_dict(), first.model.state_dict()
    plain = Trained("torch").run(2).optimizer.state_dict()
    for number, entry in plain["state"].items():
        for name, value in entry.items():
            mine = state["state"][number][name]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
    assert state["param_groups"] == plain["param_groups"]
    second = Trained(after)
    second.model.load_state_dict(weights)
    second.optimizer.load_state_dict(state)
    second.generator.set_state(first.generator.get_state())
    second.run(2)
    unbroken = Trained("torch").run(2).run(2)
    count = len(second.tensors()) - len(second.norms)
    assert_close(second.tensors()[:count], unbroken.tensors()[:count], 40)


@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_shows_in_the_norm(backend: str, bad: float) -> None:
    trained = Trained(backend)
    for p in trained.model.parameters():
        p.grad = torch.zeros_like(p)
    trained.model.W_enc.grad[5, 5] = bad  # type: ignore[index]
    with use_backend(backend):
        norm = optimizer_step(trained.model, trained.optimizer, 1e-3, 1.0)
    assert not bool(torch.isfinite(norm))
    assert bool(trained.model.W_enc[5, 5].isnan())


@pytest.mark.parametrize("backend", ["torch", CPP])
def test_a_decoder_row_of_zeros_stays_zero(backend: str) -> None:
    trained = Trained(backend)
    with torch.no_grad():
        trained.model.W_dec[3] = 0
    for p in trained.model.parameters():
        p.grad = torch.zeros_like(p)
    with use_backend(backend):
        optimizer_step(trained.model, trained.optimizer, 1e-3, 1.0)
    assert torch.equal(trained.model.W_dec[3].detach(), torch.zeros(37))


@pytest.mark.parametrize("case", ["frozen parameter", "two groups", "weight decay", "strided"])
def test_what_the_fused_step_does_not_know_is_pytorchs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_backend, "adam_step", lambda *_, **__: pytest.fail("fused"))
    trained = Trained(CPP)
    model, optimizer = trained.model, trained.optimizer
    if case == "two groups":
        halves = [list(model.parameters())[:2], list(model.parameters())[2:]]
        optimizer = torch.optim.Adam([{"params": half} for half in halves], lr=1e-2)
    if case == "weight decay":
        optimizer.param_groups[0]["weight_decay"] = 0.1
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if case == "frozen parameter":
        model.b_enc.grad = None
    if case == "strided":
        model.W_enc.grad = torch.ones(20, 700).T
    before = model.W_enc.detach().clone()
    with use_backend(CPP):
        optimizer_step(model, optimizer, 1e-2, 1.0)
    assert not torch.equal(model.W_enc.detach(), before)


def test_a_graph_from_before_the_step_cannot_be_walked_after_it() -> None:
    trained = Trained(CPP)
    loss = trained.model.W_dec.square().sum()
    trained.run(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(CPP == "torch", reason="no compiler")
def test_the_op_refuses_what_does_not_fit() -> None:
    op = torch.ops.transcoder_cpp.adam_step
    p, step = torch.ones(3, 2), torch.zeros(())

    def call(g: Tensor = p, m: Tensor = p, count: Tensor = step, unit: int = -1) -> None:
        op([p.clone()], [g], [m.clone()], [p.clone()], [count], unit, 1e-3, 0.9, 0.999, 1e-8, 1.0)

    call(unit=0)
    for wrong in ({"g": torch.ones(2, 3)}, {"m": p.double()}, {"g": torch.ones(2, 3).T}, {"count": p}, {"unit": 1}):
        with pytest.raises(ValueError, match="adam_step"):
            call(**wrong)  # type: ignore[arg-type]
