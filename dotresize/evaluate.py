"""How well a causal language model predicts text, alone and beside the model it was made from.

Perplexity and multiple choice hide what a model has lost: it may rank the right token as before and
spread the rest elsewhere, or predict a given text well and fall into loops in its own. With p the
dense model's predictions and q another model's, each a distribution over the vocabulary,

    kl         mean over predicted tokens of  sum_v p(v) ln(p(v) / q(v)),  in nats
    agreement  share of predicted tokens for which p and q have the same most likely token

and, of greedy continuations of some prompts, the share of repeated 4-grams and their perplexity
under the dense model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dotresize import distributed
from dotresize.calibration.residual_stream import Streams
from dotresize.calibration.self_generated import continue_greedily
from dotresize.calibration.text import begun
from dotresize.models.causal_lm import CausalLM

# Windows whose logits are held at a time, and tokens of which there are copies in float32: with a
# vocabulary of 100,000 those of a whole batch would be the largest thing in a narrow memory.
BATCH_WINDOWS = 2
CHUNK = 128
# Continuations: how many, of how many tokens, after how many. Loops of a collapsed model have set
# in by then, and it takes 16 seconds of a CPU core for a model of 135 M parameters.
PROMPTS = 20
PROMPT_TOKENS = 32
NEW_TOKENS = 48
# Tokens in a row whose repetition counts.
GRAM = 4


def evaluation_windows(
    stream: Tensor, length: int, count: int | None = None, first: int | None = None
) -> Tensor:
    """Return consecutive windows of a text's tokens, or ``count`` of them spread evenly over it.

    No token is in two windows. A text shorter than one window is one shorter window. With a
    ``first`` token every window begins with it, as the model's tokenizer begins every text.
    """
    if len(stream) < 2:
        raise ValueError(f"the text has {len(stream)} tokens: perplexity needs at least 2")
    length = min(length - (first is not None), len(stream))
    whole = stream[: len(stream) // length * length].view(-1, length)
    if count is None or count >= len(whole):
        return begun(whole, first)
    spread = torch.arange(count, dtype=torch.int64, device=whole.device) * len(whole) // count
    return begun(whole[spread], first)


@dataclass(frozen=True)
class Quality:
    """What a model's predictions of a text are worth.

    Attributes:
        perplexity: ``exp`` of the mean next-token loss in each window, its first token given.
        kl, agreement: see the module's header; None without a model to compare with.
    """

    perplexity: float
    kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class GreedyText:
    """What a model's greedy continuations are worth.

    Attributes:
        repeated: share of 4-grams that the same continuation has already had, a mean over them.
        perplexity: of the continuations under the dense model, their prompts given.
    """

    repeated: float
    perplexity: float


@torch.inference_mode()
def perplexity(
    model: CausalLM, windows: Tensor, *, batch_windows: int = BATCH_WINDOWS, desc: str = ""
) -> float:
    """Return ``exp`` of the mean next-token loss in each window, its first token given.

    windows: int64 (count, length). The loss is summed in float64.
    """
    pairs = ((ids, found, None) for ids, found in _logits(model, windows, batch_windows, desc))
    return _quality(pairs, model, len(windows), desc, alone=True).perplexity


@torch.inference_mode()
def quality(model: CausalLM, dense: Predictions, *, desc: str = "") -> Quality:
    """Return what a model's predictions are worth beside the dense model's of the same text."""
    own = _logits(model, dense.windows, dense.batch_windows, desc)
    both = zip(own, dense.logits(), strict=True)
    triples = ((ids, found, wanted) for (ids, found), (_, wanted) in both)
    return _quality(triples, model, len(dense.windows), desc, alone=False)


class Predictions:
    """A model's predictions of some windows, made once and asked for as often as one likes.

    What its last layer delivers is kept, which is the width for each token and not the vocabulary;
    logits are made of it, a batch at a time. Who made it closes it.

    Attributes:
        windows: int64 (count, length).
        batch_windows: how many of them a batch of logits is of.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: CausalLM,
        windows: Tensor,
        *,
        batch_windows: int = BATCH_WINDOWS,
        desc: str = "",
    ) -> None:
        """Run the model up to its head."""
        self.windows, self.batch_windows = windows, batch_windows
        self._model = model
        self._streams = Streams(model, windows, batch_windows)
        for name in tqdm(model.layers, desc=f"evaluate {desc}", unit="layer", disable=None):
            with model.resident(name) as layer:
                self._streams.pass_layer(layer)

    def logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the tokens and the logits of each batch."""
        architecture = self._model.architecture
        with self._model.resident(architecture.final_norm, architecture.head):
            for i, ids in enumerate(self._streams.batches):
                yield ids.to(self._model.device), self._streams.logits(i)

    @torch.inference_mode()
    def perplexity(self, desc: str = "") -> float:
        """Return the model's own perplexity."""
        pairs = ((ids, found, None) for ids, found in self.logits())
        return _quality(pairs, self._model, len(self.windows), desc, alone=True).perplexity

    def close(self) -> None:
        """Let what is kept go."""
        self._streams.close()


def prompts_of(texts: Iterable[Tensor], positions: int | None) -> Tensor | None:
    """Return prompts from the windows of several texts: int64 (count, tokens), None for no text.

    They are the beginnings of windows that are spread evenly; of fewer windows, several parts of
    each. positions: that the model has; as many as it needs for the continuation are left.
    """
    texts = [windows for windows in texts if len(windows)]
    length = min(PROMPT_TOKENS, max((windows.shape[1] for windows in texts), default=0))
    if positions is not None:
        length = min(length, positions - NEW_TOKENS)
    if length < 1:
        return None
    texts = [windows for windows in texts if windows.shape[1] >= length]
    wanted = -(-PROMPTS // sum(map(len, texts)))  # of each window
    parts = []
    for windows in texts:
        room = windows.shape[1] // length
        few = min(wanted, room)
        begin = [k * room // few * length for k in range(few)]
        parts.append(torch.stack([windows[:, i : i + length] for i in begin], 1).flatten(0, 1))
    found = torch.cat(parts)
    count = min(PROMPTS, len(found))
    spread = torch.arange(count, dtype=torch.int64, device=found.device)
    return found[spread * len(found) // count]


@torch.inference_mode()
def greedy_text(model: CausalLM, dense: CausalLM, prompts: Tensor, *, desc: str = "") -> GreedyText:
    """Return what a model's greedy continuations of some prompts are worth.

    prompts: int64 (count, tokens). Both models must be in memory.
    """
    given = prompts.shape[1]
    written = continue_greedily(model, prompts, NEW_TOKENS, desc=f"continue {desc}")
    texts = torch.cat([prompts.to(written.device), written], 1)
    pairs = ((ids, found, None) for ids, found in _logits(dense, texts, BATCH_WINDOWS))
    under_dense = _quality(pairs, dense, len(texts), f"text of {desc}", alone=True, given=given)
    return GreedyText(repeated_share(written), under_dense.perplexity)


def repeated_share(texts: Tensor, gram: int = GRAM) -> float:
    """Return 1 - (distinct n-grams / n-grams) of each text, a mean over them.

    texts: int64 (count, tokens).
    """
    grams = texts.unfold(1, gram, 1)
    distinct = sum(len(own.unique(dim=0)) for own in grams)
    return 1 - distinct / (grams.shape[0] * grams.shape[1])


def _quality(
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    model: CausalLM,
    windows: int,
    desc: str,
    *,
    alone: bool,
    given: int = 1,
) -> Quality:
    """Return the figures of batches of tokens, logits and the dense model's logits, if there are.

    alone: whether there are none, on any process. given: tokens of each window that are not
    predicted. Sums are in float64.
    """
    # These are the sums of loss, KL and agreement, and the number of tokens.
    sums = torch.zeros(4, dtype=torch.float64, device=model.device)
    progress = tqdm(total=windows, desc=f"evaluate {desc}", unit="window", disable=None)
    for ids, found, dense in batches:
        for i in range(len(ids)):
            for start in range(given - 1, ids.shape[1] - 1, CHUNK):
                part = slice(start, min(start + CHUNK, ids.shape[1] - 1))
                wanted = None if dense is None else dense[i, part]
                following = ids[i, part.start + 1 : part.stop + 1]
                sums += _sums(found[i, part], following, wanted)
        progress.update(len(ids))
    progress.close()
    distributed.total(sums)
    loss, kl, agreed, count = sums.tolist()
    if not math.isfinite(loss) or not math.isfinite(kl):
        raise ValueError(f"the model's loss {f'on {desc} ' if desc else ''}is not finite")
    value = math.exp(min(loss / count, 700.0))
    # Rounding may leave it a little below.
    return Quality(value) if alone else Quality(value, max(0.0, kl / count), agreed / count)


def _sums(found: Tensor, following: Tensor, dense: Tensor | None) -> Tensor:
    """Return the sums over some tokens, float64 (4,): loss, KL, agreement, their number.

    found, dense: logits (tokens, vocabulary); following: int64 (tokens,), what was to be predicted.
    """
    log_q = found.float().log_softmax(-1)
    loss = -log_q.gather(-1, following[:, None]).sum(dtype=torch.float64)
    kl = agreed = torch.zeros((), dtype=torch.float64, device=found.device)
    if dense is not None:
        log_p = dense.float().log_softmax(-1)
        each = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        kl = each.sum(dtype=torch.float64)
        agreed = (found.argmax(-1) == dense.argmax(-1)).sum(dtype=torch.float64)
    return torch.stack([loss, kl, agreed, torch.full_like(kl, len(following))])


def _logits(
    model: CausalLM, windows: Tensor, batch_windows: int, desc: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens and the logits of each batch of this process's windows.

    Those of an offloaded model all pass a layer before the next one is read.
    """
    if not model.store.whole:
        made = Predictions(model, windows, batch_windows=batch_windows, desc=desc)
        with closing(made):
            yield from made.logits()
        return
    mine = distributed.share(windows)
    for ids in mine.split(batch_windows) if len(mine) else ():
        ids = ids.to(model.device)
        yield ids, model.module(input_ids=ids, use_cache=False).logits
