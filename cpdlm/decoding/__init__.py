"""Exact decoding: one loop for autoregressive, greedy and sampled generation, with or without drafts."""

from cpdlm.decoding.captured import CapturedForwards, Captures
from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.loop import Decoded, Options, decode, decode_batch
from cpdlm.decoding.model import DraftingModel, ModelProxy

__all__ = [
    "CapturedForwards",
    "Captures",
    "Decoded",
    "DraftingModel",
    "ModelProxy",
    "Options",
    "Sampling",
    "decode",
    "decode_batch",
]
