"""Backend `cpp` of the correlation statistics: the pair update of the packed triangle (csrc/ops.cpp, `add_pairs`), called from
`exact.PackedTriangle.add`; everything else is backend `torch`'s."""

from transcoder.kernels.extension import usable

__all__ = ["usable"]
