"""Documents as bytes, with their sources; many of them without holding them all in memory, and asked for one by one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Documents:
    """Documents as bytes, with the index of their source. held_out: sources that are test as a whole. notes: what the
    readers counted, for the record. conversations: each is one, as `conversations.written` has it."""

    texts: Sequence[bytes] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    source_names: list[str] = field(default_factory=list)
    held_out: set[int] = field(default_factory=set)
    notes: dict[str, Any] = field(default_factory=dict)
    conversations: bool = False

    def add_source(self, name: str, texts: Iterable[bytes], held_out: bool = False) -> None:
        index = len(self.source_names)
        self.source_names.append(name)
        if held_out:
            self.held_out.add(index)
        added = list(texts)
        self.texts = [*self.texts, *added]
        self.sources += [index] * len(added)


class FileTexts(Sequence[bytes]):
    """Documents that are read from a file when they are asked for. offsets: (documents + 1,), where each begins."""

    def __init__(self, path: Path, offsets: NDArray[np.int64]) -> None:
        self._offsets = offsets
        self._bytes = np.memmap(path, np.uint8, "r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._bytes[self._offsets[index] : self._offsets[index + 1]].tobytes()


class Chosen(Sequence[bytes]):
    """texts[indices[0]], texts[indices[1]], ..., each looked up when it is asked for."""

    def __init__(self, texts: Sequence[bytes], indices: Sequence[int]) -> None:
        self._texts, self._indices = texts, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        return self._texts[self._indices[index]]
