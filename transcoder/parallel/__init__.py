"""One dictionary over several processes of torch.distributed: latents over some, tokens over others (docs/scale.md)."""

from transcoder.parallel.lanes import Lanes
from transcoder.parallel.sharded import ShardedTranscoder

__all__ = ["Lanes", "ShardedTranscoder"]
