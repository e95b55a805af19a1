"""Exact decoding: one loop for plain, greedy and sampled generation, with or without drafts."""

from cpdlm.decoding.captured import CapturedPasses, Captures
from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.passes import DraftingModel
from cpdlm.decoding.speculative import Decoded, decode, decode_batch

__all__ = ["CapturedPasses", "Captures", "Decoded", "DraftingModel", "Sampling", "decode", "decode_batch"]
