"""Shapes of the trunks that are trained here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Shape of a trunk. `parameters` of the published layouts are asserted by a test."""

    layers: int
    width: int
    attention_heads: int
    feed_forward: int
    key_value_heads: int = 0  # 0: as many as attention heads


# `56m` has 56.3M parameters with an 8192-token vocabulary and tied embeddings (Llama family); the paper gives the
# parameter count of its TinyStories model, not its layout, so this layout is ours.
SIZES: dict[str, Size] = {
    "micro": Size(layers=2, width=64, attention_heads=2, feed_forward=176),
    "tiny": Size(layers=4, width=128, attention_heads=4, feed_forward=344),
    "small": Size(layers=4, width=256, attention_heads=4, feed_forward=688),
    "base": Size(layers=8, width=512, attention_heads=8, feed_forward=1376),
    "56m": Size(layers=12, width=576, attention_heads=9, feed_forward=1720),
    "1b": Size(layers=16, width=2048, attention_heads=32, feed_forward=8192, key_value_heads=8),
    # Of Llama 3.1 8B: timed with random weights, as the paper times it.
    "8b": Size(layers=32, width=4096, attention_heads=32, feed_forward=14336, key_value_heads=8),
}
