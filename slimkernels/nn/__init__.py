"""Drop-in modules: block-sparse, low-rank and fused dense twins of ``nn.Conv2d`` and ``nn.Linear``."""

from slimkernels.nn.attributes import resolved_padding, unsupported_conv_reason
from slimkernels.nn.batch_norm import FusedBatchNorm2d
from slimkernels.nn.block_sparse import BlockSparseConv2d, BlockSparseLinear
from slimkernels.nn.chained import ChainedSequential, chain_sequentials_, unchain_sequentials_
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
    "chain_sequentials_",
    "guard_strided_pointwise_",
    "resolved_padding",
    "unchain_sequentials_",
    "unsupported_conv_reason",
]
