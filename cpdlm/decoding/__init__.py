"""Exact decoding: one loop for autoregressive, greedy and sampled generation, with or without drafts."""

from cpdlm.decoding.captured import CapturedForwards, Captures
from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.length import Costs
from cpdlm.decoding.lookup import LookupSettings
from cpdlm.decoding.loop import Decoded, Options, decode, decode_batch
from cpdlm.decoding.model import DraftingModel, ModelProxy
from cpdlm.decoding.prepared import Prepared, prepare
