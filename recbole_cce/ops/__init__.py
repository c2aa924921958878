"""The numerical core: losses over an item table that never hold all logits, and attention over packed sequences.

Needs torch, knows nothing of RecBole.
"""

from recbole_cce.ops.backend import triton_unavailable
from recbole_cce.ops.linear_cross_entropy import linear_cross_entropy
from recbole_cce.ops.negatives import Popularity, Uniform
from recbole_cce.ops.packed_attention import packed_attention, sequences
from recbole_cce.ops.sampled_binary_cross_entropy import sampled_binary_cross_entropy
from recbole_cce.ops.sampled_cross_entropy import sampled_cross_entropy
from recbole_cce.ops.scalable_cross_entropy import scalable_cross_entropy

__all__ = [
    "Popularity",
    "Uniform",
    "linear_cross_entropy",
    "packed_attention",
    "sampled_binary_cross_entropy",
    "sampled_cross_entropy",
    "scalable_cross_entropy",
    "sequences",
    "triton_unavailable",
]
