"""Exact decoding: one loop for plain, greedy and sampled generation, with or without drafts."""

from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.forwards import CapturedPasses, Captures
from cpdlm.decoding.loop import Decoded, decode, decode_batch
from cpdlm.decoding.passes import DraftingModel

__all__ = ["CapturedPasses", "Captures", "Decoded", "DraftingModel", "Sampling", "decode", "decode_batch"]
