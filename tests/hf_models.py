"""Models behind `transformers`, and what judges them: stock `generate` on the same weights."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)

from cpdlm.hf import CpdlmForCausalLM
from cpdlm.model.language_model import LanguageModel
from tests.test_loop import real

COMMON, TIED, OWN = (
    ("llama", 4, "token", False, True),
    ("gpt2", 4, "none", True, False),
    ("llama", 4, "none", False, False),
)
LAYOUTS = {"common": COMMON, "tied": TIED, "own": OWN}


@cache
def wrapped(layout: str, vocabulary: int = 17) -> CpdlmForCausalLM:
    return CpdlmForCausalLM.from_language_model(real(*LAYOUTS[layout], vocabulary=vocabulary))


def plain(model: LanguageModel) -> PreTrainedModel:
    """The Hugging Face model of trunk and unembedding, whose law is the target of the layouts common and tied."""
    shell = AutoModelForCausalLM.from_config(model.trunk.body.config)
    setattr(shell, shell.base_model_prefix, model.trunk.body)
    shell.get_output_embeddings().weight = model.unembedding.weight
    shell.generation_config = GenerationConfig()
    return shell.eval()


def stock(layout: str, *arguments: Any, **options: Any) -> Any:
    """What `transformers` writes, one token per pass."""
    if layout == "own":
        return GenerationMixin.generate(wrapped(layout), *arguments, **options)
    return plain(wrapped(layout).model).generate(*arguments, **options)


def batch(rows: int, vocabulary: int = 17, longest: int = 7) -> dict[str, Tensor]:
    """Prompts of unequal lengths, padded on the left with id 0."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, vocabulary, (rows, longest), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def wrap(model: LanguageModel) -> CpdlmForCausalLM:
    return CpdlmForCausalLM.from_language_model(model)
