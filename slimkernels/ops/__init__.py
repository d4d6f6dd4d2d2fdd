"""Ops of slimkernels, registered with ``torch.library``: schema, CPU and CUDA implementation, fake, autograd, autocast.

Equations (``x`` activations, ``W`` the weight that the stored blocks or factors stand for):

- `bsr_conv2d`: ``epilogue(conv2d(x, W) + bias)``, only stored blocks read
- `bsr_linear`: ``epilogue(x W^T + bias)``, only stored blocks read
- `low_rank_linear`: ``epilogue((x V^T) U^T + bias)``
- `low_rank_conv2d`: ``epilogue(conv(...conv(x, F_1)..., F_k) + bias)``
- `fused_conv2d`: ``epilogue(conv2d(x, W) + bias)``, W dense
- `batch_norm`: ``epilogue((x - mean(x)) / sqrt(var(x) + eps) weight + bias)``, as in training
"""

from slimkernels.ops.batch_norms import batch_norm
from slimkernels.ops.bsr import bsr_conv2d, bsr_linear
from slimkernels.ops.fused import fused_conv2d
from slimkernels.ops.low_rank import low_rank_conv2d, low_rank_linear

__all__ = ["batch_norm", "bsr_conv2d", "bsr_linear", "fused_conv2d", "low_rank_conv2d", "low_rank_linear"]
