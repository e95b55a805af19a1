"""Which documents train, validate and test: a function of their content alone."""

import hashlib

import numpy as np

from cpdlm.config import Config, ConfigError
from cpdlm.data.documents import Chosen, Documents
from cpdlm.data.duplicates import clusters
from cpdlm.data.stored import SPLITS
from cpdlm.data.windows import mix

HELD_OUT_SHARE = 0.05  # of the documents, for validation and for test


def assign_splits(documents: Documents, config: Config) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Indices of each split's documents in hash order, and counts of what was left out.

    Whole-document copies are dropped (a held-out one stays). A cluster of near-duplicates goes where the hash of the
    cluster sends it: about 90 % train, 5 % validation, 5 % test, others for every `data.release`. Where packages are
    held out, they alone are the test split, near-duplicates of theirs are dropped, and the other documents are 95 %
    train. ConfigError below 3 clusters.
    """
    digests = b"".join(hashlib.sha256(text).digest()[:8] for text in documents.texts)
    hashes = np.frombuffer(digests, dtype=">u8").astype(np.uint64)
    # Held-out documents first, so that of two copies theirs is kept.
    order = sorted(range(len(hashes)), key=lambda i: (documents.sources[i] not in documents.held_out, hashes[i], i))
    unique = list({int(hashes[i]): i for i in reversed(order)}.values())
    unique.sort(key=lambda i: hashes[i])
    labels = clusters(Chosen(documents.texts, unique))
    # Of a cluster, `unique` holds the lowest hash first, and labels name the lowest index.
    share = mix(hashes[np.array(unique)][labels] if unique else np.zeros(0, np.uint64)) / 2.0**64
    share = (share - 2 * HELD_OUT_SHARE * config.data.release) % 1.0
    held_out = np.array([documents.sources[i] in documents.held_out for i in unique], dtype=bool)
    touched = np.isin(labels, labels[held_out])
    counts = {
        "read": len(hashes),
        "copies_dropped": len(hashes) - len(unique),
        "near_duplicates": int(len(labels) - len(np.unique(labels))),
        "near_held_out_dropped": int((touched & ~held_out).sum()),
    }
    needed = ("validation",) if held_out.any() else ("test", "validation")
    lot = np.unique(labels[~touched])
    if len(lot) <= len(needed):
        raise ConfigError(
            f"corpus={config.corpus} has {len(unique)} different documents in {len(lot)} groups of near-duplicates; "
            f"train, validation and test need {len(needed) + 1} groups at least; give more text"
        )
    lot = lot[np.argsort(share[lot], kind="stable")]
    split_of = {int(label): "train" for label in lot}
    begin = 0
    for number, name in enumerate(needed, start=1):
        end = int(np.searchsorted(share[lot], HELD_OUT_SHARE * number))
        # A small corpus may have no cluster there: then the next one serves. The train split keeps one in any case.
        end = min(max(end, begin + 1), len(lot) - 1 - (len(needed) - number))
        split_of.update((int(label), name) for label in lot[begin:end])
        begin = end
    assignment: dict[str, list[int]] = {name: [] for name in SPLITS}
    for position, index in enumerate(unique):
        if held_out[position]:
            assignment["test"].append(index)
        elif not touched[position]:
            assignment[split_of[int(labels[position])]].append(index)
    return assignment, counts


def take(documents: Documents, indices: list[int], assignment: dict[str, list[int]], max_bytes: int) -> list[int]:
    """The first documents of a split until its share of max_bytes is reached: in proportion to the splits' sizes, at
    least a twentieth, and one document at least. All of them where max_bytes is 0."""
    if not max_bytes:
        return indices
    total = sum(len(documents.texts[i]) for split in assignment.values() for i in split)
    sizes = np.array([len(documents.texts[i]) for i in indices])
    budget = max_bytes * max(sizes.sum() / total, 0.05)
    return indices[: int(np.searchsorted(np.cumsum(sizes), budget)) + 1]
