"""SparseCodes: the compressed rows that flow between the ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.kernels.backend import active_backend

_VALID = "valid"
"""Key of `SparseCodes._derived` that marks a pattern as valid."""


class LatentOrder(NamedTuple):
    """The feature-major view of a set of codes: entries sorted by latent, ties by row (a stable sort)."""

    permutation: Tensor
    """[nnz] int64: entry numbers, so `values[permutation]` is feature-major."""
    rows: Tensor
    """[nnz] int64: the row of each entry, feature-major."""
    latent_ptr: Tensor
    """[d_sae + 1] int64: latent i owns the feature-major entries latent_ptr[i] .. latent_ptr[i + 1]."""


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """Sparse activations of B tokens over d_sae latents, as compressed rows.

    Within a row, indices ascend and are unique. `values` are never negative; an entry whose value is 0 is inactive (TopK
    keeps exactly k entries a row, so a row with fewer than k positive pre-activations carries zeros).

    The constructor checks types, lengths and devices, not contents. `validate` checks the pattern; the ops call it on the CPU,
    once a pattern. Results of the encode ops and of `from_dense` are right by construction and are not checked.

    Fields:
        values: [nnz] floating point, carries the autograd graph.
        indices: [nnz] int64, latent ids in [0, d_sae).
        row_ptr: [B + 1] int64, row b owns entries row_ptr[b] .. row_ptr[b + 1].
        shape: (B, d_sae).

    Equivalent to: `torch.sparse_csr_tensor(row_ptr, indices, values, shape)`.
    """

    values: Tensor
    indices: Tensor
    row_ptr: Tensor
    shape: tuple[int, int]
    _derived: dict[str, object] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("values", "indices", "row_ptr"):
            part = getattr(self, name)
            if not isinstance(part, Tensor):
                raise TypeError(f"SparseCodes.{name}: expected a tensor, got {type(part).__name__}")
            if part.dim() != 1:
                raise ValueError(f"SparseCodes.{name}: expected one dimension, got shape {tuple(part.shape)}")
        if not self.values.is_floating_point():
            raise TypeError(f"SparseCodes.values: expected a floating dtype, got {self.values.dtype}")
        for name in ("indices", "row_ptr"):
            dtype = getattr(self, name).dtype
            if dtype != torch.int64:
                raise TypeError(f"SparseCodes.{name}: expected int64, got {dtype}")
        if self.values.shape != self.indices.shape:
            raise ValueError(
                f"SparseCodes: values and indices must have one length, got {self.values.numel()} and {self.indices.numel()}"
            )
        if len(self.shape) != 2 or self.row_ptr.numel() != self.shape[0] + 1 or min(self.shape) < 0:
            raise ValueError(
                f"SparseCodes: row_ptr must hold B + 1 entries for shape (B, d_sae) = {tuple(self.shape)}, "
                f"got {self.row_ptr.numel()}"
            )
        if not (self.values.device == self.indices.device == self.row_ptr.device):
            raise ValueError(
                "SparseCodes: values, indices and row_ptr must share a device, got "
                f"{self.values.device}, {self.indices.device}, {self.row_ptr.device}"
            )

    @classmethod
    def trusted(
        cls,
        values: Tensor,
        indices: Tensor,
        row_ptr: Tensor,
        shape: tuple[int, int],
        derived: dict[str, object] | None = None,
    ) -> SparseCodes:
        """Codes whose pattern is right by construction and is not validated. For ops that make codes.

        Args:
            values, indices, row_ptr, shape: the fields.
            derived: data computed from the same pattern, shared with these codes; None starts empty.
        """
        derived = {} if derived is None else derived
        derived[_VALID] = True
        return cls(values, indices, row_ptr, shape, derived)

    @property
    def nnz(self) -> int:
        """Stored entries, inactive ones included."""
        return self.values.numel()

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def with_values(self, values: Tensor) -> SparseCodes:
        """The same pattern with other values [nnz]; the feature-major order is shared, not computed again."""
        return SparseCodes(values, self.indices, self.row_ptr, self.shape, self._derived)

    def detach(self) -> SparseCodes:
        return self.with_values(self.values.detach())

    def derived(self, name: str, make: Callable[[], object]) -> object:
        """The result of `make()`, which may depend on the pattern only: computed once, shared with `with_values` copies."""
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]

    def validate(self, where: str = "SparseCodes") -> None:
        """Check that the pattern is one of compressed rows: O(nnz), once a pattern. Reads the device. Values are not checked.
        Under tracing (torch.compile, fake tensors, a dispatch mode) it does nothing: there are no contents.

        Args:
            where: the beginning of the errors.

        Raises: ValueError naming the first wrong row and what was expected: row_ptr from 0 to nnz without
            descending, ids in [0, d_sae), ascending and unique within a row.
        """
        if _VALID not in self._derived and not traced(self.row_ptr):
            problem = _pointer_problem(self) or _id_problem(self)
            if problem is not None:
                raise ValueError(f"{where}: {problem}")
            self._derived[_VALID] = True

    def _validate_where_free(self) -> None:
        """`validate` on the CPU only, where the host does not wait. Later code would read a wrong pattern out of bounds."""
        if self.device.type == "cpu":
            self.validate()

    def rows(self) -> Tensor:
        """[nnz] int64: the row of each entry. Computed once. On the CPU a wrong pattern is refused (`validate`)."""

        def make() -> Tensor:
            self._validate_where_free()
            every = torch.arange(self.shape[0], device=self.device)
            return torch.repeat_interleave(every, self.row_ptr.diff(), output_size=self.nnz)

        rows = self.derived("rows", make)
        assert isinstance(rows, Tensor)
        return rows

    def by_latent(self) -> LatentOrder:
        """The feature-major order: one stable sort, computed once and shared by every reduction over tokens. On the CPU a
        wrong pattern is refused (`validate`)."""

        def make() -> LatentOrder:
            self._validate_where_free()
            backend = active_backend(self.device, "encode")
            if torch.compiler.is_compiling():
                return LatentOrder(*torch.ops.transcoder.by_latent(self.indices, self.row_ptr, self.shape[1], backend))
            if backend == "cpp":
                found = torch.ops.transcoder_cpp.by_latent(
                    self.indices.contiguous(), self.row_ptr.contiguous(), self.shape[1]
                )
                return LatentOrder(*found)
            # 32-bit keys halve the sort's passes; d_sae fits by far.
            sorted_ids, permutation = self.indices.to(torch.int32).sort(stable=True)
            boundaries = torch.arange(self.shape[1] + 1, device=self.device, dtype=torch.int32)
            latent_ptr = torch.searchsorted(sorted_ids, boundaries)
            return LatentOrder(permutation, self.rows()[permutation], latent_ptr)

        order = self.derived("by_latent", make)
        assert isinstance(order, LatentOrder)
        return order

    def to_dense(self) -> Tensor:
        """[B, d_sae] in the dtype of `values`; differentiable. For tests, references and small inputs."""
        flat = self.rows() * self.shape[1] + self.indices
        dense = self.values.new_zeros(self.shape[0] * self.shape[1])
        return dense.index_put((flat,), self.values).view(self.shape)

    def to_sparse_csr(self) -> Tensor:
        """A torch CSR tensor of the same entries (values shared). A wrong pattern is refused (`validate`): PyTorch's own
        products of such a tensor would read out of bounds."""
        self.validate()
        return torch.sparse_csr_tensor(self.row_ptr, self.indices, self.values, self.shape, check_invariants=False)

    @classmethod
    def from_dense(cls, z: Tensor) -> SparseCodes:
        """The positive entries of z [B, d_sae]. Reads the count on the host."""
        if not isinstance(z, Tensor) or z.dim() != 2:
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"SparseCodes.from_dense: expected z [B, d_sae], got {got}")
        positive = z > 0
        rows, indices = positive.nonzero(as_tuple=True)
        row_ptr = torch.zeros(z.shape[0] + 1, dtype=torch.int64, device=z.device)
        torch.cumsum(positive.sum(1), 0, out=row_ptr[1:])
        return cls.trusted(z[rows, indices], indices, row_ptr, (z.shape[0], z.shape[1]))


def traced(*tensors: Tensor) -> bool:
    """Whether the call is traced (by a compiler, a dispatch mode or a tensor subclass): reading a number on the host would then
    break the graph, or fail."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in tensors)
    )


def _pointer_problem(codes: SparseCodes) -> str | None:
    ptr = codes.row_ptr
    first, last = int(ptr[0]), int(ptr[-1])
    falls = (ptr.diff() < 0).nonzero()
    if first != 0:
        return f"row_ptr: row 0: expected to begin at entry 0, got {first}"
    if falls.numel():
        row = int(falls[0])
        return f"row_ptr: row {row}: expected pointers that do not descend, got {int(ptr[row])} .. {int(ptr[row + 1])}"
    if last != codes.nnz:
        return f"row_ptr: row {max(0, codes.shape[0] - 1)}: expected to end at nnz = {codes.nnz}, got {last}"
    return None


def _id_problem(codes: SparseCodes) -> str | None:
    """After `_pointer_problem`."""
    ids, ptr, d_sae = codes.indices, codes.row_ptr, codes.shape[1]
    fine = (ids >= 0) & (ids < d_sae)
    rises = ids.diff() > 0
    # The first entry of a row need not be above the last one of the row before.
    first = ptr[(ptr > 0) & (ptr < codes.nnz)]
    rises[first - 1] = True
    fine[1:] &= rises
    if bool(fine.all()):
        return None
    entry = int(fine.logical_not().nonzero()[0])
    row = int(torch.searchsorted(ptr, entry, right=True)) - 1
    got = int(ids[entry])
    if not 0 <= got < d_sae:
        return f"indices: row {row}: expected latents in [0, {d_sae}), got {got}"
    return (
        f"indices: row {row}: expected ascending, unique latents, got {got} after {int(ids[entry - 1])}; sort each row "
        "and add up repeated latents"
    )
