"""Where rows, futures and documents begin and end: index arithmetic only, so that one test can hold it to a slow loop.

The stream of a split is its documents' tokens, end to end; document d is stream[offsets[d] : offsets[d + 1]]. Rows are
slices of `context` tokens at stride `context`; a last partial row is dropped. The window after a position may run past
its row, never beyond its document.

Letters: B rows, T position in a row, N horizon.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def row_count(tokens: int, context: int) -> int:
    """How many whole rows a stream of `tokens` tokens has."""
    return tokens // context


def row_starts(rows_B: Ints, context: int) -> Ints:
    """Stream positions of the first tokens of the given rows."""
    return np.asarray(rows_B, dtype=np.int64) * context


def document_of(offsets: Ints, positions: Ints) -> Ints:
    """Index of the document that holds each stream position (empty documents hold none)."""
    return np.searchsorted(offsets, positions, side="right") - 1


def position_ids(offsets: Ints, starts_B: Ints, context: int) -> Ints:
    """(B, T) positions since the start of the row, or of the document where one starts within the row."""
    positions_BT = starts_B[:, None] + np.arange(context)
    begins_BT = np.maximum(offsets[document_of(offsets, positions_BT)], starts_B[:, None])
    return positions_BT - begins_BT


def successor_counts(
    offsets: Ints, starts_B: Ints, context: int, horizon: int, trained: NDArray[np.bool_] | None = None
) -> Ints:
    """(B, T) how many of x_{t+1..t+N} exist in the document of x_t: 0 to N.

    trained: which tokens of the stream are trained on (None: all); the window then ends before the first that is not.
    """
    positions_BT = starts_B[:, None] + np.arange(context)
    ends_BT = offsets[document_of(offsets, positions_BT) + 1]
    counts_BT = np.minimum(ends_BT - 1 - positions_BT, horizon)
    if trained is None:
        return counts_BT
    wanted_BTN = positions_BT[..., None] + np.arange(1, horizon + 1)
    run_BTN = np.logical_and.accumulate(trained[np.minimum(wanted_BTN, len(trained) - 1)], axis=-1)
    return np.minimum(counts_BT, run_BTN.sum(axis=-1))


def futures(tokens: NDArray[np.integer], starts_B: Ints, successors_BT: Ints, horizon: int) -> Ints:
    """(B, T, N) the successors x_{t+1..t+N}; 0 where `successors_BT` says that there is none."""
    context = successors_BT.shape[1]
    steps_N = np.arange(1, horizon + 1)
    wanted_BTN = starts_B[:, None, None] + np.arange(context)[:, None] + steps_N
    future_BTN = tokens[np.minimum(wanted_BTN, len(tokens) - 1)].astype(np.int64)
    return np.where(steps_N <= successors_BT[..., None], future_BTN, 0)


def batch(
    tokens: NDArray[np.integer],
    offsets: Ints,
    rows_B: Ints,
    context: int,
    horizon: int,
    trained: NDArray[np.bool_] | None = None,
) -> dict[str, Ints]:
    """The arrays of one batch: tokens_BT, position_ids_BT, future_BTN, successors_BT (all int64)."""
    starts_B = row_starts(rows_B, context)
    successors_BT = successor_counts(offsets, starts_B, context, horizon, trained)
    return {
        "tokens_BT": tokens[starts_B[:, None] + np.arange(context)].astype(np.int64),
        "position_ids_BT": position_ids(offsets, starts_B, context),
        "future_BTN": futures(tokens, starts_B, successors_BT, horizon),
        "successors_BT": successors_BT,
    }


def row_sources(offsets: Ints, source_ids: NDArray[np.integer], rows_B: Ints, context: int) -> Ints:
    """(B,) the source that most tokens of each row come from (the lowest id where two have as many)."""
    starts_B = row_starts(rows_B, context)
    sources_BT = source_ids[document_of(offsets, starts_B[:, None] + np.arange(context))]
    return np.array([np.bincount(row_T).argmax() for row_T in sources_BT], dtype=np.int64)


def picked(starts_B: Ints, context: int, fraction: float, *keys: int) -> NDArray[np.bool_]:
    """(B, T) a random share of positions, each chosen by a hash of `keys` and its position in the stream.

    So the choice depends neither on the process that sees a row nor on the rows beside it.
    """
    state = _keyed(keys)
    noise_BT = mix(((starts_B[:, None] + np.arange(context)).astype(np.uint64) ^ state).ravel())
    return ((noise_BT >> np.uint64(11)) * 2.0**-53 < fraction).reshape(len(starts_B), context)


def mix(values: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
    """The splitmix64 finaliser: a fixed 64-bit hash, the same on every machine and in every process."""
    x = np.atleast_1d(np.asarray(values, dtype=np.uint64))
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_order(count: int, *keys: int) -> Ints:
    """A permutation of range(count) that is a pure function of `keys`."""
    return np.argsort(mix(np.arange(count, dtype=np.uint64) ^ _keyed(keys)), kind="stable")


def _keyed(keys: tuple[int, ...]) -> NDArray[np.uint64]:
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = mix(state ^ mix(key))
    return state
