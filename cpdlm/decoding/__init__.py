"""Exact decoding: one loop for plain, greedy and sampled generation, with or without drafts."""

from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.speculative import Decoded, DraftingModel, decode, decode_batch

__all__ = ["Decoded", "DraftingModel", "Sampling", "decode", "decode_batch"]
