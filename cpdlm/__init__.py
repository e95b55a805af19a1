"""Multi-token prediction with rank-r canonical probability decomposition, and lossless decoding from it."""

__version__ = "0.1.0"
