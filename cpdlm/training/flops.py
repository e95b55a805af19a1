"""FLOPs and weights of a model, from its shape alone: the one formula behind plans, forecasts and tables.

A multiply-add is 2 FLOPs; norms, biases and softmaxes are not counted. `flop_count` measures what was really done.

Letters: V vocabulary, D width, R rank, F factors, K inner width of a map.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpdlm.config import SIZES, Config


@dataclass(frozen=True)
class Shape:
    """What heads and loss multiply. factors: 0 for a next-token model. map_weights: of one map, 0 for separate heads.

    shared_weights: of the map that sees x_{t+1}, the link, base maps, transitions. frozen: whether the trunk and its
    unembedding are.
    """

    vocab: int
    width: int
    rank: int
    factors: int
    map_weights: int
    separate: bool
    first_is_tied: bool
    frozen: bool
    shared_weights: int = 0

    @classmethod
    def of(cls, config: Config, vocab: int, width: int = 0) -> Shape:
        """width: of the trunk (default: that of config.size)."""
        width, model = width or SIZES[config.size].width, config.model
        separate, inner = model.head == "separate", model.map_hidden or model.map_rank or model.component_rank
        return cls(
            vocab,
            width,
            config.rank,
            config.horizon - config.first_is_tied,
            0 if separate else 2 * width * inner if inner else width * width,
            separate,
            config.first_is_tied,
            config.frozen != "self",
            _shared_weights(config, width),
        )

    @property
    def rows(self) -> int:
        """Logit rows of one position: a factor of a component each."""
        return self.rank * self.factors

    @property
    def head_weights(self) -> int:
        """Weights of all that stands between hidden state and unembedding."""
        if not self.factors:
            return 0
        own = self.vocab * self.width if self.separate else self.map_weights
        return self.rows * own + self.rank * self.width + self.shared_weights


def _shared_weights(config: Config, width: int) -> int:
    model, factors = config.model, config.horizon - config.first_is_tied
    inner = round(model.draft_width * width) if config.link != "none" else 0
    link = model.link_width * width * (2 + factors) if config.link == "all" else 0
    transitions = (factors - 1) * config.rank**2 * width if config.joint == "hmm" and config.rank > 1 else 0
    base = factors * width**2 if model.component_rank else 0
    return 3 * width * inner + link + transitions + base


def trunk_flops(config: Config) -> float:
    """FLOPs per token of a forward of a trunk of ours; attention is over all pairs of positions of a row."""
    size = SIZES[config.size]
    return 2.0 * (trunk_matrices(config) + size.layers * 2 * config.data.context * size.width)


def trunk_matrices(config: Config) -> int:
    """Weights of the layers of a trunk of ours."""
    size = SIZES[config.size]
    shared = (size.key_value_heads or size.attention_heads) / size.attention_heads
    attention = int((2 + 2 * shared) * size.width**2)
    perceptron = 8 * size.width**2 if config.model.family == "gpt2" else 3 * size.width * size.feed_forward
    return size.layers * (attention + perceptron)


def trunk_forwards(config: Config) -> float:
    """Forwards of the trunk per token of training, a backward counted as two; stored states take one for all epochs."""
    if config.frozen == "self":
        return 3.0
    if not config.data.states:
        return 1.0
    return min(1.0, config.data.states / (config.optim.steps * config.data.batch_rows * config.data.context))


def draft_flops(shape: Shape, head_weights: int = 0) -> int:
    """FLOPs of one draft of all tokens: gate, maps and what they share once, and an unembedding for each row.

    head_weights: as they were counted (default: those of the shape).
    """
    unembedding = 0 if shape.separate else shape.rows * shape.vocab * shape.width
    return 2 * ((head_weights or shape.head_weights) + unembedding)


def loss_flops(shape: Shape, config: Config) -> dict[str, float]:
    """FLOPs of the loss per token of the text, forward and backward: {"next token", "window" (with heads)}.

    Each product has a gradient for either side; a frozen unembedding has none. Untied, x_{t+1} has a term of its own
    where not all positions train the window; on a frozen trunk only heads with a first factor of their own have it.
    """
    table = 2.0 * shape.vocab * shape.width
    table_times = 2 if shape.frozen and not shape.separate else 3
    if not shape.factors:
        return {"next token": table_times * table}
    covered = config.loss.draft_vocabulary or shape.vocab
    row = table_times * 2.0 * covered * shape.width + 3 * 2.0 * shape.map_weights
    share, other_objective = config.loss.joint_fraction, config.loss.objective != "joint"
    first = 0.0
    if shape.first_is_tied:
        first = 0.0 if shape.frozen else table_times * table
    elif share < 1 and not (shape.frozen and (config.loss.draft_vocabulary or other_objective)):
        first = shape.rank * row
    read = 1 - (1 - share) ** shape.factors  # states that a target is read from: windows that overlap share them
    target = 2.0 * covered * shape.width * read if other_objective else 0.0
    return {"next token": first, "window": share * shape.rows * row + target}
