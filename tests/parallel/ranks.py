"""ranks.py DP TP CHECK...: ranks that compare a ShardedTranscoder with one process that holds everything."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from transcoder.config import TrainingSection
from transcoder.dictionary_config import CONVENTIONS, TranscoderConfig
from transcoder.kernels import SparseCodes
from transcoder.model import Transcoder
from transcoder.parallel import ShardedTranscoder
from transcoder.training.optimizer import make_optimizer, optimizer_step

D_IN, D_OUT, D_SAE, ROWS = 12, 10, 96, 32
"""At least 4 tokens and 8 latents a rank of 8: products of fewer are summed in another order by the matrix library."""
BASE = TranscoderConfig(D_IN, D_OUT, D_SAE, 6, widths=[20, 43, 96], aux_k=5, dead_after_tokens=128)


def on_ranks(dp: int, tp: int, names: list[str]) -> None:
    """Run the checks on dp * tp processes that talk by gloo; the first one's error is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (dp, tp, names, folder), nprocs=dp * tp)


def _rank(rank: int, dp: int, tp: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=dp * tp, timeout=wait)
    try:
        everything(init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp")), names)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def config(**changed: Any) -> TranscoderConfig:
    return dataclasses.replace(BASE, **changed)


def pair(mesh: DeviceMesh, settings: TranscoderConfig, dtype: torch.dtype = torch.float32, lanes: int = 8) -> Any:
    """(whole, sharded): the same weights."""
    whole = Transcoder(settings, seed=3)
    with torch.no_grad():
        g = torch.Generator().manual_seed(8)
        whole.b_enc.copy_(0.1 * torch.randn(len(whole.b_enc), generator=g))
        whole.b_enc[::4] -= 3  # These fire rarely and die.
        whole.b_dec.copy_(0.1 * torch.randn(len(whole.b_dec), generator=g))
    sharded = ShardedTranscoder(whole, mesh, lanes).to(dtype)
    return whole.to(dtype), sharded


def tokens(seed: int, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """(x, y) of the whole batch: correlated, of a few directions, so that some latents take more than others."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, D_IN, generator=g) * (1 + 3 * torch.rand(rows, 1, generator=g))
    mix = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), torch.tanh(x @ mix).to(dtype)


def mine(mesh: DeviceMesh, *values: Tensor) -> list[Tensor]:
    """This rank's rows."""
    dp, rank = dist.get_world_size(mesh.get_group("dp")), dist.get_rank(mesh.get_group("dp"))
    return [value.chunk(dp)[rank] for value in values]


def joined(mesh: DeviceMesh, model: ShardedTranscoder, codes: SparseCodes) -> Tensor:
    """[B, d_sae] of every rank's codes."""
    dense = codes.to_dense().detach()
    latents = [torch.empty_like(dense.T.contiguous()) for _ in range(model.lanes.ranks)]
    dist.all_gather(latents, dense.T.contiguous(), group=model.tp)
    block = model.lanes.join(latents).T.contiguous()
    rows = [torch.empty_like(block) for _ in range(model.copies)]
    dist.all_gather(rows, block, group=model.dp)
    return torch.cat(rows)


def same_bits(a: Tensor, b: Tensor, what: str) -> None:
    assert torch.equal(a.nan_to_num(nan=-5.0), b.nan_to_num(nan=-5.0)), what


def inputs() -> dict[str, Tensor]:
    plain, _ = tokens(5)
    one, _ = tokens(6)
    one[0] *= 1000  # one token has most of the largest activations
    whole_numbers = torch.randint(-1, 2, plain.shape, generator=torch.Generator().manual_seed(2)).float()
    flat, nan = torch.zeros_like(plain), plain.clone()
    nan[3, 2] = torch.nan
    return {"plain": plain, "one token": one, "ties": whole_numbers, "flat": flat, "NaN": nan}


def codes(mesh: DeviceMesh) -> None:
    """TopK and BatchTopK choose what one process chooses, bit for bit: ties, flat rows, NaN, k above a rank's latents."""
    for activation in ("topk", "batch_topk"):
        for k in (1, 6, D_SAE // 2, D_SAE):
            for tied in (False, True):
                whole, sharded = pair(mesh, config(activation=activation, k=k))
                if tied:  # Many equal pre-activations, all of them exact.
                    for model in (whole, sharded):
                        for weight in (model.W_enc, model.b_enc):
                            weight.data = weight.data.mul(4).round().clamp(-1, 1)
                for name, x in inputs().items():
                    if name == "NaN" and activation == "batch_topk":
                        continue  # The row of NaN takes the whole budget, and which of its latents is not defined.
                    what = f"{activation}, k {k}, {name}, tied {tied}"
                    same_bits(joined(mesh, sharded, sharded.encode(*mine(mesh, x))), whole.encode(x).to_dense(), what)
                    whole.eval(), sharded.eval()
                    for model in (whole, sharded):
                        model.threshold.fill_(0.4)
                    part = sharded.encode(*mine(mesh, x))
                    same_bits(joined(mesh, sharded, part), whole.encode(x).to_dense(), what + ", evaluation")
                    whole.train(), sharded.train()


def gradients(mesh: DeviceMesh) -> None:
    """Loss, metrics and gradients of every convention, of token weights, AuxK and the skip connection."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        for convention in CONVENTIONS:
            for activation in ("topk", "batch_topk"):
                settings = config(
                    activation=activation, loss=convention, skip=convention == "mse", prefix_weights=[1, 2, 0.5]
                )
                whole, sharded = pair(mesh, settings, dtype)
                x, y = tokens(9, dtype)
                weights = torch.rand(len(x), generator=torch.Generator().manual_seed(4)).to(dtype) + 0.5
                dead = torch.arange(D_SAE) % 5 == 0
                dead[:8] = True
                whole.tokens_since_fired[dead] = 1000
                sharded.tokens_since_fired[sharded.lanes.take(dead)] = 1000
                assert whole.refresh_dead() == sharded.refresh_dead() == int(dead.sum())
                expected = whole.training_step(x, y, token_weights=weights)
                expected.loss.backward()
                ours = mine(mesh, x, y, weights)
                found = sharded.training_step(*ours[:2], token_weights=ours[2])
                found.loss.backward()
                norm, one = sharded.clip_gradients(torch.inf), whole.clip_gradients(torch.inf)
                close(norm, one, tolerance, "norm")
                for name in ("loss", "aux_loss", "mse_per_prefix", "fvu_per_prefix"):
                    value = getattr(found, name).detach().clone()
                    dist.all_reduce(value, group=sharded.dp)
                    close(value / sharded.copies, getattr(expected, name).detach(), tolerance, f"{convention} {name}")
                for name, parameter in sharded.named_parameters():
                    assert parameter.grad is not None
                    wanted = dict(whole.named_parameters())[name].grad
                    close(sharded._joined(name, parameter.grad), wanted, tolerance, f"{convention} {activation} {name}")
                same_bits(sharded._joined("dead", sharded.dead).float(), whole.dead.float(), "dead")


def close(found: Tensor, expected: Tensor | None, tolerance: float, what: str) -> None:
    assert expected is not None
    scale = expected.abs().max().clamp_min(1e-30)
    off = float((found - expected).detach().abs().max() / scale)
    assert off <= tolerance * 4, f"{what}: {off:.3g} of the largest number, above {4 * tolerance:g}"


def train(mesh: DeviceMesh, model: Any, steps: int, dtype: torch.dtype, whole: bool) -> list[int]:
    """Dead latents at every refresh."""
    optimizer, counts = make_optimizer(model, TrainingSection(), 3e-3), []
    for step in range(steps):
        if step % 10 == 0:
            counts.append(model.refresh_dead())
        x, y = tokens(1000 + step, dtype)
        if not whole:
            x, y = mine(mesh, x, y)
        bad = torch.zeros((), dtype=torch.bool)
        model.training_step(x, y).loss.backward()
        optimizer_step(model, optimizer, 3e-3, 0.05, bad)
        assert not bool(bad)
    return counts


def training(mesh: DeviceMesh, steps: int = 40) -> None:
    """Weights after steps with clipping and AuxK; the dead latents on the way; the same bits twice."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        for activation in ("topk", "batch_topk"):
            whole, sharded = pair(mesh, config(activation=activation), dtype)
            again = pair(mesh, config(activation=activation), dtype)[1]
            expected = train(mesh, whole, steps, dtype, True)
            assert max(expected) > 0, "no latent died: AuxK was not tried"
            assert train(mesh, sharded, steps, dtype, False) == expected
            train(mesh, again, steps, dtype, False)
            for name, value in sharded.state_dict().items():
                same_bits(value.double(), again.state_dict()[name].double(), f"{name} of the second run")
            joint = sharded.gather()
            for name, value in joint.state_dict().items():
                wanted = whole.state_dict()[name].double()
                off = float((value.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1))
                assert off <= tolerance, f"{activation} {dtype} {name}: {off:.3g}"


def a_bad_step_is_bad_everywhere(mesh: DeviceMesh) -> None:
    _, model = pair(mesh, config())
    optimizer = make_optimizer(model, TrainingSection(), 1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items() if name.startswith(("W", "b"))}
    x, y = tokens(3)
    y[0, 0] = torch.nan
    bad = torch.zeros((), dtype=torch.bool)
    model.training_step(*mine(mesh, x, y)).loss.backward()
    optimizer_step(model, optimizer, 1e-2, 1.0, bad)
    assert bool(bad)
    for name, value in before.items():
        same_bits(value, model.state_dict()[name], name)


def files(mesh: DeviceMesh) -> None:
    """The files are those of the whole, whatever the number of ranks; a shard's copy is not the whole's memory."""
    whole, model = pair(mesh, config())
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    model.save_pretrained(folder[0])
    for name, value in Transcoder.from_pretrained(folder[0]).state_dict().items():
        same_bits(value.float(), whole.state_dict()[name].float(), name)
    x, _ = tokens(7)
    (part,) = mine(mesh, x)
    wanted = whole.eval()(x)
    close(model.eval()(part), mine(mesh, wanted)[0], 1e-6, "forward")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert float(whole.W_enc.abs().max()) > 0


CHECKS = {check.__name__: check for check in (codes, gradients, training, a_bad_step_is_bad_everywhere, files)}


def everything(mesh: DeviceMesh, names: list[str]) -> None:
    for name in names:
        CHECKS[name](mesh)


if __name__ == "__main__":
    on_ranks(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    print("all checks hold")
