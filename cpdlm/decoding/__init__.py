"""Exact decoding: one loop for plain, greedy and sampled generation, with or without drafts."""

from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.forwards import CapturedForwards, Captures
from cpdlm.decoding.loop import Decoded, decode, decode_batch
from cpdlm.decoding.step import DraftingModel

__all__ = ["CapturedForwards", "Captures", "Decoded", "DraftingModel", "Sampling", "decode", "decode_batch"]
