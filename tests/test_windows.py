"""Attention windows that bind: rows, trees and dead slots as `generate` has them; and logits an ulp apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_pretrained import continued, loaded, saved
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    Olmo3Config,
)

from cpdlm.bench.contenders import hugging_face
from cpdlm.config import ConfigError
from cpdlm.decoding import Options, Sampling, cache, decode, decode_batch
from cpdlm.decoding.drafters import DRAFTERS
from cpdlm.model.heads import HeadsConfig
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.trunk import Trunk

NARROW: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "sliding_window": 12,
}
MIXED = NARROW | {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16, "pad_token_id": 0}
WINDOWED: dict[str, Callable[[], Any]] = {
    "mistral": lambda: MistralConfig(**NARROW),
    "gemma2": lambda: Gemma2Config(**MIXED),
    "gemma3 with images": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**MIXED),
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    ),
    "olmo3": lambda: Olmo3Config(**MIXED),
    "gpt-oss": lambda: GptOssConfig(**MIXED, num_local_experts=2, num_experts_per_tok=1),
}


def windowed(name: str) -> LanguageModel:
    torch.manual_seed(0)
    trunk = Trunk(AutoModel.from_config(WINDOWED[name]()))
    shape = HeadsConfig(rank=2, horizon=4)
    model = LanguageModel(trunk, 17, shape, frozen_target=True, context=64, tie_embeddings=False).eval()
    model = model if name == "gpt-oss" else model.double()  # whose experts know no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(2 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


@pytest.mark.parametrize("name", WINDOWED)
def test_a_binding_attention_window_is_exact_for_rows_and_trees(name: str) -> None:
    """Layers count the window in slots, dead ones and other branches' included; the text counts it in tokens."""
    model, prompts = windowed(name), [torch.tensor(ids) for ids in ([1, 2, 3], [4, 5] * 8, [7])]
    assert model.attention_window == 12
    right = [decode(model, prompt, 24, Sampling(0.0), draft="none").tokens for prompt in prompts]
    generate = hugging_face(model)
    assert generate is not None and right == [generate(prompt, 24, Sampling(0.0), 0) for prompt in prompts]
    for draft in ("none", "chain", "tree"):
        rows = decode_batch(model, prompts, 24, Sampling(0.0), draft=draft, options=Options(nodes=6))
        assert [each.tokens for each in rows] == right, draft
    assert decode(model, prompts[1], 24, Sampling(0.0), draft="tree").tokens == right[1]
    whole = decode_batch(model, prompts, 24, Sampling(0.0), draft="tree", options=Options(use_cache=False))
    assert [each.tokens for each in whole] == right


def test_a_window_that_cannot_be_masked_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not bind where the texts are shorter, however many dead slots there are."""
    model, prompts = windowed("mistral"), [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    model.trunk.body.config.sliding_window = 48
    right = [decode(model, prompt, 40, Sampling(0.0)).tokens for prompt in prompts]
    monkeypatch.setattr(Trunk, "masks_windows", False)
    monkeypatch.setattr(cache, "WASTE", 10.0)  # slots are not closed up for their number
    assert [each.tokens for each in decode_batch(model, prompts, 40, Sampling(0.0))] == right
    monkeypatch.setattr(LanguageModel, "hidden", None)
    for rows, draft in ((prompts, "chain"), (prompts[:1], "tree")):
        with pytest.raises(ValueError, match="attend to the last 48 slots .* one row at a time, with draft='chain'"):
            decode_batch(model, rows, 50, Sampling(0.0), draft=draft)


@pytest.mark.parametrize("shape", [MistralConfig, Gemma2Config])
def test_a_window_is_tried_on_as_many_tokens_as_it_holds(shape: Any, tmp_path: Path) -> None:
    sizes = NARROW | {"head_dim": 16, "pad_token_id": 0}
    folder = saved(shape(**sizes | {"sliding_window": 6}), tmp_path / "6")
    prompt_T, theirs = torch.tensor([4, 5] * 4), AutoModelForCausalLM.from_pretrained(folder).eval()
    assert decode(loaded(folder, context=6), prompt_T, 24, Sampling(0.0)).tokens == continued(theirs, prompt_T, 24)
    with pytest.raises(ConfigError, match="the last 5 tokens in some layers, .* tried on 6; give .* a longer window"):
        loaded(saved(shape(**sizes | {"sliding_window": 5}), tmp_path / "5"), context=5)


@pytest.mark.parametrize("draft", DRAFTERS)
def test_greedy_tells_logits_apart_that_are_an_ulp_apart(draft: str) -> None:
    """Log-probabilities in float32 would be equal, and the smaller id would win."""
    model = windowed("mistral").float()
    logits_V = torch.zeros(17)
    logits_V[3] = 0.1
    logits_V[0] = logits_V[3].nextafter(torch.tensor(0.0))
    model.output = lambda hidden, table: logits_V.expand(*hidden.shape[:-1], 17)  # type: ignore[assignment]
    log_probs_V = model.target_log_probs(torch.zeros(1, 1, 32)).flatten()
    assert log_probs_V[0] == log_probs_V[3]
    assert decode(model, torch.tensor([1, 2]), 8, Sampling(0.0), draft=draft).tokens == [3] * 8
