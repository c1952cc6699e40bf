"""Other people's structured pruning, written from the papers, to be measured on the same tokens.

Each peer takes the dense model, int64 tokens (windows, length) and the share of the parameters
outside the embeddings that stays, and returns a model of that size without training it. What no
plain checkpoint can hold (layers of different widths or heads, biases, ranks of attention) is a
simulation: the dense shapes, with zeros for what is gone, and a count of what would be left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dotresize.models.causal_lm import CausalLM

from . import blocks, flap, llm_pruner, modegpt, two_ssp
from .layers import Pruned


@dataclass(frozen=True)
class Peer:
    """A method of the field.

    Attributes:
        paper: where it is from.
        plain: whether the result is a plain checkpoint.
        prune: makes the model; its arguments are those of the module's header.
    """

    paper: str
    plain: bool
    prune: Callable[[CausalLM, Tensor, float], Pruned]


PEERS: dict[str, Peer] = {
    "FLAP": Peer("arXiv 2312.11983", False, flap.prune),
    "LLM-Pruner": Peer("arXiv 2305.11627", False, llm_pruner.prune),
    "MoDeGPT": Peer("arXiv 2408.09632", False, modegpt.prune),
    "MoDeGPT, feed-forwards": Peer("arXiv 2408.09632", True, modegpt.prune_feed_forwards),
    "2SSP": Peer("arXiv 2501.17771", False, two_ssp.prune),
    "SLEB": Peer("arXiv 2402.09025", True, blocks.sleb),
    "ShortGPT": Peer("arXiv 2403.03853", True, blocks.short_gpt),
}
