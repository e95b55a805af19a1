"""What a streamer is told of rows that are written at different speeds."""

from typing import Any

import torch


class Stream:
    """Hands tokens to a streamer as stock `generate` does: one of every row at a time, pad where a row has ended."""

    def __init__(self, streamer: Any, rows: int) -> None:
        self.streamer, self.sent = streamer, 0
        self.texts: list[list[int]] = [[] for _ in range(rows)]

    def put(self, row: int, tokens: list[int]) -> None:
        self.texts[row].extend(tokens)
        self._send(min(len(text) for text in self.texts), None)

    def end(self, pad: int | None) -> None:
        self._send(max(len(text) for text in self.texts), pad)
        self.streamer.end()

    def _send(self, until: int, pad: int | None) -> None:
        for index in range(self.sent, until):
            self.streamer.put(torch.tensor([text[index] if index < len(text) else pad for text in self.texts]))
        self.sent = max(self.sent, until)
