"""The ops as torch.library sees them: opcheck, torch.compile without a break, fake tensors, autocast, no wait for a device."""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transcoder.config import TrainingSection
from transcoder.kernels import (
    FeatureCorrelation,
    SparseCodes,
    batch_topk_encode,
    nested_loss,
    registration,
    sparse_decode,
    threshold_encode,
    topk_encode,
    use_backend,
)
from transcoder.kernels.backend import active_backend, has_backend
from transcoder.kernels.decode import op as decode
from transcoder.kernels.encode import op as encode
from transcoder.kernels.encode import torch_backend
from transcoder.model import StepOutput, Transcoder, TranscoderConfig
from transcoder.training.optimizer import make_optimizer, optimizer_step

ROWS, D_IN, D_OUT, D_SAE, K = 13, 12, 10, 48, 4
WIDTHS = [8, 24, 48]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def inputs(dtype: torch.dtype, rows: int, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = draw(rows, D_IN, dtype=dtype), draw(D_SAE, D_IN, dtype=dtype), draw(D_SAE, dtype=dtype)
    return x.requires_grad_(grad), W.requires_grad_(grad), b.requires_grad_(grad)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


EVERY_DAY = {
    ("topk", ROWS, torch.float32),
    ("topk", 0, torch.float64),
    ("batch_topk", 1, torch.bfloat16),
    ("threshold", ROWS, torch.float64),
    ("threshold", 0, torch.float32),
}
"""Each op, each dtype and each number of rows; the other combinations are slow."""
COMBINATIONS = itertools.product(
    ("topk", "batch_topk", "threshold"), (ROWS, 1, 0), (torch.float32, torch.float64, torch.bfloat16)
)


@pytest.mark.parametrize(
    ("which", "rows", "dtype"),
    [pytest.param(*c, marks=() if c in EVERY_DAY else pytest.mark.slow) for c in COMBINATIONS],
)
def test_opcheck_of_the_encode_ops(which: str, rows: int, dtype: torch.dtype, cpu_backend: str) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    op, argument = {
        "topk": (encode.TOPK, K),
        "batch_topk": (encode.BATCH_TOPK, K),
        "threshold": (encode.THRESHOLD, torch.tensor(0.5, dtype=wide)),
    }[which]
    torch.library.opcheck(op, (*inputs(dtype, rows, True), argument, dtype, cpu_backend))


def test_opcheck_of_strided_and_mixed_inputs(cpu_backend: str) -> None:
    x = draw(D_IN, ROWS).T.requires_grad_()
    W = draw(D_SAE, 2 * D_IN)[:, ::2].bfloat16().requires_grad_()
    b = draw(2 * D_SAE)[::2].requires_grad_()
    for op, dtype in itertools.product((encode.TOPK, encode.BATCH_TOPK), (torch.float32, torch.bfloat16)):
        torch.library.opcheck(op, (x, W, b, K, dtype, cpu_backend))
    codes = some_codes()
    y, W_dec = draw(D_OUT, ROWS).T.requires_grad_(), draw(D_OUT, D_SAE).T.bfloat16().requires_grad_()
    parts = (codes.values.clone().requires_grad_(), codes.indices, codes.row_ptr, W_dec, draw(2 * D_OUT)[::2])
    torch.library.opcheck(decode.DECODE, (*parts, cpu_backend))
    torch.library.opcheck(decode.NESTED, (*parts, y, draw(2 * ROWS).abs()[::2], WIDTHS, cpu_backend))


def some_codes(dtype: torch.dtype = torch.float32) -> SparseCodes:
    x, W, b = inputs(dtype, ROWS, False)
    return batch_topk_encode(x, W, b, K)


@pytest.mark.parametrize(
    "needs",
    [
        [True, True, True],
        pytest.param([False, True, True], marks=pytest.mark.slow),
        pytest.param([True, False, False], marks=pytest.mark.slow),
        [False, False, True],
    ],
)
def test_opcheck_of_the_gradient_ops(needs: list[bool], cpu_backend: str) -> None:
    codes, x, W = some_codes(), draw(ROWS, D_IN), draw(D_SAE, D_IN)
    parts, order = (codes.values, codes.indices, codes.row_ptr), list(codes.by_latent())
    grad, W_dec = draw(codes.nnz), draw(D_SAE, D_OUT)
    of_encode = (grad, *parts, order, x, W if needs[0] else None, D_SAE, needs, torch.float32, cpu_backend)
    torch.library.opcheck(encode.GRADIENTS, of_encode)
    torch.library.opcheck(decode.DECODE_GRADIENTS, (draw(ROWS, D_OUT), *parts, order, W_dec, needs, cpu_backend))


@pytest.mark.parametrize(
    ("widths", "weighted"),
    [
        (WIDTHS, True),
        ([8, 24], False),
        *(
            pytest.param(*c, marks=pytest.mark.slow)
            for c in ((WIDTHS, False), ([8, 24], True), ([48], False), ([48], True))
        ),
    ],
)
def test_opcheck_of_decode_and_the_nested_loss(widths: list[int], weighted: bool, cpu_backend: str) -> None:
    codes = some_codes()
    values, order = codes.values.clone().requires_grad_(), list(codes.by_latent())
    parts = (codes.indices, codes.row_ptr)
    W, b = draw(D_SAE, D_OUT).requires_grad_(), draw(D_OUT).requires_grad_()
    y, token_weights = draw(ROWS, D_OUT).requires_grad_(), draw(ROWS).abs() if weighted else None
    torch.library.opcheck(decode.DECODE, (values, *parts, W, b, cpu_backend))
    torch.library.opcheck(decode.NESTED, (values, *parts, W, b, y, token_weights, widths, cpu_backend))
    arguments = (draw(len(widths)), codes.values, *parts, order, W.detach(), draw(ROWS, D_OUT), token_weights)
    torch.library.opcheck(decode.NESTED_GRADIENTS, (*arguments, widths, cpu_backend))
    torch.library.opcheck(registration.by_latent, (*parts, D_SAE, cpu_backend))


class _Looking(TorchDispatchMode):
    """Notes what passes the dispatcher; what looks on makes the ops be ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def every_op(encodes: int = 3) -> list[Tensor]:
    x, W, b = inputs(torch.float32, ROWS, True)
    W_dec, b_dec = draw(D_SAE, D_OUT).requires_grad_(), draw(D_OUT).requires_grad_()
    results = []
    makers: list[tuple[Callable[..., SparseCodes], float]] = [
        (threshold_encode, 0.25),
        (batch_topk_encode, K),
        (topk_encode, K),
    ]
    for encode_, argument in makers[:encodes]:
        codes = encode_(x, W, b, argument)
        loss = nested_loss(codes, W_dec, b_dec, draw(ROWS, D_OUT), WIDTHS, [1.0, 2.0, 0.5])
        out = sparse_decode(codes, W_dec, b_dec)
        grads = torch.autograd.grad(loss.value + out.square().sum(), (x, W, b, W_dec, b_dec))
        results += [codes.values, codes.indices, codes.row_ptr, loss.per_prefix, loss.residual, out, *grads]
    return [t.detach() for t in results]


def test_an_op_and_a_plain_call_give_the_same_bits(cpu_backend: str) -> None:
    plain = every_op()
    with _Looking() as mode:
        through_ops = every_op()
    names = {name.split(".")[1] for name in mode.seen if name.startswith("transcoder.")}
    assert names == {
        *("topk_encode", "batch_topk_encode", "threshold_encode", "encode_gradients", "by_latent"),
        *("sparse_decode", "sparse_decode_gradients", "nested_loss", "nested_loss_gradients"),
    }
    assert all(torch.equal(a, b) for a, b in zip(plain, through_ops, strict=True))


def test_fake_tensors_flow_without_memory() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, W, b = torch.empty(4096, 2304), torch.empty(1 << 20, 2304, requires_grad=True), torch.zeros(1 << 20)
        codes = topk_encode(x, W, b, 64)
        loss = nested_loss(codes, W, torch.zeros(2304), x, [1 << 18, 1 << 20]).value
        (grad,) = torch.autograd.grad(loss, (W,))
    assert codes.nnz == 4096 * 64
    assert grad.shape == W.shape


def test_a_second_derivative_is_refused_by_name() -> None:
    x, W, b = inputs(torch.float32, ROWS, True)
    with _Looking():
        values = topk_encode(x, W, b, K).values
        (grad,) = torch.autograd.grad(values.square().sum(), (W,), create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(grad.sum(), (x,))


def transcoder(activation: Any, seed: int = 0) -> Transcoder:
    config = TranscoderConfig(D_IN, D_OUT, D_SAE, K, activation=activation, widths=WIDTHS, skip=True)
    model = Transcoder(config, seed=seed).train()
    model.set_normalization(draw(64, D_IN), draw(64, D_OUT), "standardize")
    return model


def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    # aot_eager: everything that fullgraph needs (tracing, fake tensors, gradients, functionalisation) and the eager kernels.
    return torch.compile(step, fullgraph=True, backend="aot_eager")


def same_step(
    eager: Transcoder, other: Transcoder, step: Callable[[Tensor, Tensor], StepOutput], rounds: int = 2
) -> None:
    """A few steps of both: losses, codes, gradients, counters and thresholds bit for bit."""
    optimizers = [make_optimizer(m, TrainingSection(), 1e-2) for m in (eager, other)]
    for n in range(rounds):
        x, y = draw(ROWS, D_IN, seed=n), draw(ROWS, D_OUT, seed=n)
        want, got = eager.training_step(x, y), step(x, y)
        for a, b in zip((want.loss, *want[2:]), (got.loss, *got[2:]), strict=True):
            assert a is b is None or torch.equal(a, b)  # only a selection that trains its threshold has a penalty
        assert isinstance(got.codes, SparseCodes)
        assert torch.equal(want.codes.to_dense(), got.codes.to_dense())
        want.loss.backward()
        got.loss.backward()
        for (name, p), q in zip(eager.named_parameters(), other.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad), name
        for model, optimizer in zip((eager, other), optimizers, strict=True):
            optimizer_step(model, optimizer, 1e-2, 1.0)
        states = eager.state_dict(), other.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_a_training_step_compiles_whole(activation: str) -> None:
    eager, other = transcoder(activation), transcoder(activation)
    same_step(eager, other, compiled(other.training_step))


def test_auxk_and_token_weights_compile() -> None:
    eager, other = transcoder("topk"), transcoder("topk")
    for model in (eager, other):
        model.tokens_since_fired[::2] = 10**9
        assert model.refresh_dead() == D_SAE // 2
    weights = draw(ROWS).abs()
    step = compiled(lambda x, y: other.training_step(x, y, token_weights=weights))
    plain = eager.training_step
    eager.training_step = lambda x, y: plain(x, y, token_weights=weights)  # type: ignore[method-assign,misc,assignment]
    same_step(eager, other, step)


def test_other_numbers_of_dead_latents_are_not_compiled_again() -> None:
    """The list changes every few dozen steps, and a run has thousands of those: the number has to be a size, no constant."""
    model = transcoder("topk")
    step = compiled(lambda x, y: model.training_step(x, y).loss)
    x, y = draw(ROWS, D_IN), draw(ROWS, D_OUT)
    graphs = torch._dynamo.utils.counters["stats"]
    for n, dead in enumerate((40, 33, 30, 21, 11)):
        model.tokens_since_fired.copy_(torch.where(torch.arange(D_SAE) < dead, 10**9, 0))
        assert model.refresh_dead() == dead
        assert torch.equal(step(x, y), model.training_step(x, y).loss)
        if n == 1:
            made = graphs["unique_graphs"]
    assert graphs["unique_graphs"] == made


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_compiles_to_what_it_is(inside: bool) -> None:
    eager, other = transcoder("topk"), transcoder("topk")

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return other.training_step(x, y).loss

    x, y = draw(ROWS, D_IN), draw(ROWS, D_OUT)
    with torch.autocast("cpu", torch.bfloat16):
        want = eager.training_step(x, y)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        got = compiled(step if inside else lambda x, y: other.training_step(x, y).loss)(x, y)
    full = copy.deepcopy(eager).training_step(x, y).loss
    assert want.codes.dtype == torch.float32
    assert torch.equal(want.loss, got)
    assert not torch.equal(want.loss, full)
    want.loss.backward()
    got.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(eager.parameters(), other.parameters(), strict=True))


def test_a_size_that_depends_on_the_data_compiles() -> None:
    model = transcoder("batch_topk")
    x = draw(ROWS, D_IN)
    model.training_step(x, draw(ROWS, D_OUT))
    model.eval()
    forward, encoded = compiled(model.forward), compiled(model.encode)
    for n in range(3):
        x = draw(ROWS, D_IN, seed=n)
        assert torch.equal(forward(x), model(x))
        assert torch.equal(encoded(x).to_dense(), model.encode(x).to_dense())


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_a_trained_model_exports(activation: str) -> None:
    model = transcoder(activation)
    model.training_step(draw(ROWS, D_IN), draw(ROWS, D_OUT))
    program = torch.export.export(model.eval(), (draw(ROWS, D_IN),))
    # The ops sit in what export makes of the blocks without autocast.
    parts = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = {str(n.target) for part in parts for n in part.graph.nodes}
    encode_op = "topk_encode" if activation == "topk" else "threshold_encode"
    assert {f"transcoder.{encode_op}.default", "transcoder.sparse_decode.default"} <= names
    x = draw(ROWS, D_IN, seed=5)
    assert torch.equal(program.module()(x), model(x))


def test_recomputed_and_offloaded_activations_give_the_same_gradients(cpu_backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    x, W, b = inputs(torch.float32, ROWS, True)

    def loss() -> Tensor:
        return nested_loss(topk_encode(x, W, b, K), W, torch.zeros(D_IN), x.detach(), WIDTHS).value

    want = torch.autograd.grad(loss(), (x, W, b))
    recomputed = torch.autograd.grad(checkpoint(loss, use_reentrant=False), (x, W, b))
    with torch.autograd.graph.save_on_cpu():
        value = loss()
    offloaded = torch.autograd.grad(value, (x, W, b))
    for got in (recomputed, offloaded):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_compiled_code_follows_use_backend_and_its_gradient_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name in ("select_topk", "gradients"):
        original = getattr(torch_backend, name)
        monkeypatch.setattr(
            torch_backend, name, lambda *a, _f=original, _n=name, **k: (asked.append(_n), _f(*a, **k))[1]
        )
    x, W, b = inputs(torch.float32, ROWS, True)
    for step in (
        lambda: topk_encode(x, W, b, K).values.sum(),
        compiled(lambda: topk_encode(x, W, b, K).values.sum()),
    ):
        with use_backend("torch"):
            inside = step()
        assert asked == ["select_topk"]
        inside.backward()
        assert asked == ["select_topk", "gradients"]
        asked.clear()
    monkeypatch.setenv("TRANSCODER_BACKEND", "torch")
    step()
    assert asked == ["select_topk"]


def test_compiled_code_follows_the_first_choice_of_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled in a thread that has chosen nothing yet, as every program begins."""
    ran: list[str] = []
    inside = encode.backend_module
    monkeypatch.setattr(encode, "backend_module", lambda family, name: (ran.append(name), inside(family, name))[1])
    x, W, b = inputs(torch.float32, ROWS, False)
    step = compiled(lambda: topk_encode(x, W, b, K).values.sum())

    def outside_then_inside() -> None:
        step()
        with use_backend("torch"):
            step()

    thread = threading.Thread(target=outside_then_inside)
    thread.start()
    thread.join()
    assert ran == [active_backend("cpu", "encode"), "torch"]


def test_the_feature_major_order_is_sorted_once_a_step() -> None:
    from functorch.compile import min_cut_rematerialization_partition, nop
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return nop(graph, example)

    # The partition that inductor uses: what forward and backward ask for twice is computed once.
    ours = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    model = transcoder("topk")
    torch.compile(model.training_step, fullgraph=True, backend=ours)(
        draw(ROWS, D_IN), draw(ROWS, D_OUT)
    ).loss.backward()
    names = [str(n.target).split(".")[1] for g in graphs for n in g.graph.nodes if "transcoder." in str(n.target)]
    assert sorted(names) == ["by_latent", "encode_gradients", "nested_loss", "nested_loss_gradients", "topk_encode"]


def test_full_checks_say_why_they_break_the_graph() -> None:
    x, W, b = inputs(torch.float32, ROWS, False)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="checks='full' reads x on the host"):
        compiled(lambda: topk_encode(x, W, b, K, checks="full").values)()
    broken = torch.compile(lambda: topk_encode(x, W, b, K, checks="full").values, backend="eager")
    assert torch.equal(broken(), topk_encode(x, W, b, K).values)


def test_errors_are_the_same_in_compiled_code() -> None:
    x, W, b = inputs(torch.float32, ROWS, False)
    with pytest.raises(Exception, match="expected between 1 and d_sae"):
        torch.compile(lambda: topk_encode(x, W, b, 0).values, backend="aot_eager")()
    with pytest.raises(Exception, match=r"x: expected shape \[\*, 12\]"):
        torch.compile(lambda: topk_encode(x[:, :5], W, b, 2).values, backend="aot_eager")()


READS_THE_DEVICE = {
    *("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.equal.default"),
    *("aten.is_nonzero.default", "aten._unique2.default", "aten.unique_dim.default", "aten.repeat_interleave.Tensor"),
}
"""What ends in a read of the device, a graph capture's end: a size or a branch that depends on data."""


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = str(func).startswith("aten.index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in (args[1] if len(args) > 1 else ()) or ()
        )
        sized = "output_size" in kwargs and kwargs["output_size"] is not None
        if by_mask or (str(func) in READS_THE_DEVICE and not sized):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


@pytest.mark.usefixtures("interpreted_again")
def test_in_the_interpreter() -> None:
    """In a process of its own."""


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ["topk", pytest.param("batch_topk", marks=pytest.mark.slow)])
def test_a_triton_step_never_waits(
    activation: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every size is known beforehand: what a CUDA graph needs. bench.gpu_check captures one where there is a GPU."""
    model = transcoder(activation).to(triton_device)
    optimizer = make_optimizer(model, TrainingSection(), 1e-2)
    monitors = [FeatureCorrelation(D_SAE, m, device=triton_device) for m in (None, 32)]
    x, y = draw(ROWS, D_IN).to(triton_device), draw(ROWS, D_OUT).to(triton_device)

    def step() -> Tensor:
        out = model.training_step(x, y)
        out.loss.backward()
        optimizer_step(model, optimizer, 1e-2, 1.0)
        for monitor in monitors:
            monitor.update(out.codes)
        return out.loss.detach()

    with use_backend("triton"):
        first = step()
        # The mode would stop at the ops: without them it sees all that happens inside.
        monkeypatch.setattr(registration, "traced", lambda *tensors: False)
        with _NoReads():
            second = step()
    assert torch.isfinite(first)
    assert torch.isfinite(second)
    if triton_device.type == "cpu":
        # On the CPU backend torch reads counts, which is free there: the mode sees such reads inside an op.
        with use_backend("torch"), _NoReads(), pytest.raises(AssertionError, match="waits for the device"):
            step()


@pytest.mark.interpreted
def test_triton_through_the_ops_is_triton(triton_device: torch.device) -> None:
    with use_backend("triton"), torch.device(triton_device):
        plain = every_op(1)
        with _Looking() as mode:
            through_ops = every_op(1)
    assert mode.seen["transcoder.nested_loss_gradients.default"] == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, through_ops, strict=True))


def test_the_mode_sees_a_read() -> None:
    with _NoReads():
        for read in (
            lambda t: t.item(),
            lambda t: t[t > 0],
            lambda t: (t > 0).nonzero(),
            lambda t: bool((t > 0).any()),
        ):
            with pytest.raises(AssertionError, match="waits for the device"):
                read(torch.ones(1))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_the_feature_major_order_compiles_in_the_users_own_code(backend: str) -> None:
    z = torch.relu(torch.randn(9, 13, generator=torch.Generator().manual_seed(0)))
    codes = SparseCodes.from_dense(z)

    def permutation(values: torch.Tensor, indices: torch.Tensor, row_ptr: torch.Tensor) -> torch.Tensor:
        return SparseCodes(values, indices, row_ptr, (9, 13)).by_latent().permutation * 2

    with use_backend(backend) if has_backend(backend, "encode") else contextlib.nullcontext():
        whole = torch.compile(permutation, fullgraph=True, backend="aot_eager")
        found = whole(codes.values, codes.indices, codes.row_ptr)
    assert torch.equal(found, codes.by_latent().permutation * 2)


def test_another_batch_size_is_no_other_graph() -> None:
    W, b = torch.randn(40, 8), torch.zeros(40)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    encode = torch.compile(lambda x: topk_encode(x, W, b, 3).values, fullgraph=True, backend=count)
    for rows in (5, 6, 7, 9, 12):
        assert encode(torch.randn(rows, 8)).shape == (3 * rows,)
    assert graphs <= 2  # the first size, and any size
