"""Fused sparse ops for transcoders: import name `transcoder.kernels`. Public functions, nothing else."""

if __name__ == "kernels":
    # This folder installs as transcoder.kernels; the bare name belongs to Hugging Face's package, which transformers looks for.
    # With the checkout on sys.path (`python -m`, a script in the root) that import finds this file instead. So it steps aside:
    # the real package from the rest of the path takes its place or, where there is none, it looks absent.
    def _step_aside() -> None:
        import importlib.machinery
        import importlib.util
        import os
        import sys

        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        elsewhere = [p for p in sys.path if os.path.realpath(p or os.getcwd()) != os.path.realpath(here)]
        spec = importlib.machinery.PathFinder.find_spec("kernels", elsewhere)
        if spec is None or spec.loader is None:
            del globals()["__file__"]
            return
        module = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = module
        spec.loader.exec_module(module)

    _step_aside()
else:
    from transcoder.kernels.backend import active_backend, use_backend
    from transcoder.kernels.correlation.op import CorrelatedPairs, FeatureCorrelation
    from transcoder.kernels.decode.op import NestedLoss, nested_loss, sparse_decode
    from transcoder.kernels.encode.op import batch_topk_encode, threshold_encode, topk_encode
    from transcoder.kernels.sparse_codes import LatentOrder, SparseCodes

    __all__ = [
        "CorrelatedPairs",
        "FeatureCorrelation",
        "LatentOrder",
        "NestedLoss",
        "SparseCodes",
        "active_backend",
        "batch_topk_encode",
        "nested_loss",
        "sparse_decode",
        "threshold_encode",
        "topk_encode",
        "use_backend",
    ]
