"""Drop-in modules: twins of ``nn.Conv2d`` and ``nn.Linear`` (block-sparse, low-rank, fused), a Sequential of chains."""

from slimkernels.nn.attributes import resolved_padding, unsupported_conv_reason
from slimkernels.nn.batch_norm import FusedBatchNorm2d
from slimkernels.nn.block_sparse import BlockSparseConv2d, BlockSparseLinear
from slimkernels.nn.chained import ChainedSequential
from slimkernels.nn.fused import FusedConv2d
from slimkernels.nn.low_rank import LowRankConv2d, LowRankLinear
from slimkernels.nn.strided_pointwise import guard_strided_pointwise_
from slimkernels.ops.flops import register_flop_formulas

# Here and not with the ops: importing the package alone imports no more of torch than torch itself does.
register_flop_formulas()

__all__ = [
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "ChainedSequential",
    "FusedBatchNorm2d",
    "FusedConv2d",
    "LowRankConv2d",
    "LowRankLinear",
    "guard_strided_pointwise_",
    "resolved_padding",
    "unsupported_conv_reason",
]
