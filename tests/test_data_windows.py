"""Windows never cross a document, held against a slow loop that shares no code with what it tests."""

import numpy as np

from cpdlm.data import windows


def slow_batch(
    documents: list[list[int]], rows: list[int], context: int, horizon: int, marks: list[list[bool]]
) -> dict[str, np.ndarray]:
    """The four arrays of a batch, one token at a time. A window ends before the first token that is not trained on."""
    stream = [(token, d, p) for d, document in enumerate(documents) for p, token in enumerate(document)]
    batch: dict[str, list] = {"tokens_BT": [], "position_ids_BT": [], "future_BTN": [], "successors_BT": []}
    for row in rows:
        tokens, ids, futures, counts, since, last = [], [], [], [], 0, None
        for t in range(row * context, (row + 1) * context):
            token, document, index = stream[t]
            since = 0 if document != last else since + 1
            last = document
            rest = []
            for place in range(index + 1, min(index + 1 + horizon, len(documents[document]))):
                if not marks[document][place]:
                    break
                rest.append(documents[document][place])
            tokens.append(token)
            ids.append(since)
            futures.append(rest + [0] * (horizon - len(rest)))
            counts.append(len(rest))
        for name, value in zip(batch, (tokens, ids, futures, counts), strict=True):
            batch[name].append(value)
    return {name: np.array(value) for name, value in batch.items()}


def test_windows_never_cross_a_document() -> None:
    for seed in range(20):
        draw = np.random.default_rng(seed)
        context, horizon = int(draw.integers(2, 9)), int(draw.integers(1, 7))
        # Some documents shorter than the horizon, some longer than a row.
        documents = [draw.integers(1, 100, size=draw.integers(2, 20)).tolist() for _ in range(12)]
        tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
        offsets = np.cumsum([0, *map(len, documents)])
        rows = draw.permutation(windows.row_count(len(tokens), context))[:7].tolist()
        marks = [(draw.random(len(document)) < (seed % 3 + 1) / 3).tolist() for document in documents]  # all of them
        trained = None if seed % 3 == 2 else np.array([mark for each in marks for mark in each])  # in every third
        got = windows.batch(tokens, offsets, np.array(rows), context, horizon, trained)
        for name, wanted in slow_batch(documents, rows, context, horizon, marks).items():
            np.testing.assert_array_equal(got[name], wanted, err_msg=f"{name}, seed {seed}")
            assert got[name].dtype == np.int64


def test_a_last_partial_row_is_dropped_but_its_tokens_are_futures() -> None:
    tokens, offsets = np.arange(10, dtype=np.uint16), np.array([0, 10])
    assert windows.row_count(10, 4) == 2
    got = windows.batch(tokens, offsets, np.array([1]), 4, 3)
    assert got["future_BTN"][0, -1].tolist() == [8, 9, 0]
    assert got["successors_BT"][0].tolist() == [3, 3, 3, 2]


def test_row_sources_is_the_majority() -> None:
    offsets, sources = np.array([0, 3, 5, 12]), np.array([0, 1, 2])
    assert windows.row_sources(offsets, sources, np.array([0, 1, 2]), 4).tolist() == [0, 2, 2]


def test_hash_order_is_a_fixed_permutation() -> None:
    order = windows.hash_order(1000, 1, 0, 0)
    assert sorted(order.tolist()) == list(range(1000))
    # A golden value: if it changes, resumed runs and prompts change with it.
    assert windows.hash_order(8, 1, 0, 0).tolist() == [5, 2, 1, 3, 7, 0, 6, 4]
    assert not np.array_equal(order, windows.hash_order(1000, 1, 0, 1))
    assert not np.array_equal(order, windows.hash_order(1000, 1, 1, 0))
