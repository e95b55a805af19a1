"""The model as `transformers` saves and loads it, bit for bit, and its loss."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
)

from cpdlm.config import resolve
from cpdlm.hf import CpdlmConfig, CpdlmForCausalLM
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.trunk import CACHE
from tests.hf_models import wrap, wrapped


def same_weights(one: LanguageModel, other: LanguageModel) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    buffers = dict(other.named_buffers())
    assert all(torch.equal(each, buffers[name]) for name, each in one.named_buffers())
    assert one.embeddings_are_tied == other.embeddings_are_tied


BUILT: list[dict[str, Any]] = [
    {},
    {"rank": 2, "model.tie_embeddings": False, "balance": "bias"},
    {"model.head": "separate", "model.family": "gpt2"},
    {"model.map_rank": 3, "link": "first", "model.draft_width": 0.125},
    {"model.map_hidden": 6, "link": "blind"},
    {"rank": 1, "horizon": 1, "model.family": "gpt2"},
    {"model.trunk": "frozen"},
]


@pytest.mark.parametrize("overrides", BUILT, ids=[",".join(each) or "default" for each in BUILT])
def test_a_saved_model_comes_back_bit_for_bit(overrides: dict[str, Any], tmp_path: Path) -> None:
    base = {"size": "micro", "data.context": 64, "decode.prompt_tokens": 8, "decode.new_tokens": 8}
    trunk = build_language_model(resolve(base | {"rank": 1, "horizon": 1}), 17) if "model.trunk" in overrides else None
    model = build_language_model(resolve(base | overrides), 17, trunk).eval()
    with torch.no_grad():
        for buffer in (model.heads.balance_bias_R if model.heads is not None else None,):
            if buffer is not None:
                buffer.copy_(torch.tensor([0.5, -0.5]))
    CpdlmForCausalLM.from_language_model(model, 3, 4).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "cpdlm_installed.py",
        "generation_config.json",
        "model.safetensors",
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, CpdlmForCausalLM) and not loaded.training
    same_weights(model, loaded.model)
    for parameter in loaded.parameters():
        # In a mapped file tensors stand where they happen to, and the rounding of a product depends on where that is.
        parameter.data = parameter.data.clone()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CpdlmConfig)
    assert (loaded.generation_config.bos_token_id, loaded.generation_config.eos_token_id) == (3, 4)
    assert any(each.requires_grad for each in loaded.model.trunk.parameters()) == (trunk is None)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        hidden = model.hidden(ids)
        assert torch.equal(loaded(ids).logits, wrap(model)(ids).logits)
        torch.testing.assert_close(loaded(ids).logits.log_softmax(-1), model.target_log_probs(hidden))
        if model.heads is not None:
            pending = torch.tensor([5])
            ours, theirs = (each.draft_joint(hidden[:, -1], pending) for each in (model, loaded.model))
            assert torch.equal(ours.log_factors_NRV, theirs.log_factors_NRV)


def test_a_folder_with_other_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    wrapped("common").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in state if "heads.gate" in key)
    save_file(
        {key: each for key, each in state.items() if key != gone}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"is not whole: its weights lack .*{gone}"):
        CpdlmForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_both_names_that_the_library_has_for_it(name: str) -> None:
    model, ids, cache = wrapped("own"), torch.tensor([[1, 5, 2, 9]]), DynamicCache()
    first = model(ids[:, :2], **{name: cache})
    assert (first.cache if CACHE == "cache" else first.past_key_values) is cache
    torch.testing.assert_close(model(ids[:, 2:], **{name: cache}).logits, model(ids).logits[:, 2:])
    with pytest.raises(ValueError, match="two names of one thing"):
        model(ids, cache=cache, past_key_values=cache)


def test_the_loss_is_that_of_the_target() -> None:
    model = wrapped("own")
    ids = torch.tensor([[1, 5, 2, 9], [3, 3, 4, 8]])
    labels = ids.clone()
    labels[0, 2] = -100
    log_probs = model.model.target_log_probs(model.model.hidden(ids))[:, :-1]
    nll = -log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    loss = model(ids, labels=labels).loss
    torch.testing.assert_close(loss.double(), (nll.sum() - nll[0, 1]) / 5, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="output_attentions: this model maps input_ids to logits, nothing else"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="inputs_embeds: this model maps input_ids to logits, nothing else"):
        model(inputs_embeds=torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match="nonsense: this model maps input_ids to logits, nothing else"):
        model(ids, nonsense=None)
    assert model(ids, inputs_embeds=None, output_attentions=False).logits.shape == (2, 4, 17)


@pytest.mark.parametrize("change", [{"new_num_tokens": 20}, {"pad_to_multiple_of": 8}])
def test_other_embeddings_are_refused_before_anything_changes(change: dict[str, int], tmp_path: Path) -> None:
    """The trunk's table alone grew, and what was saved then could not be loaded."""
    model = wrap(copy.deepcopy(wrapped("common").model))
    with pytest.raises(ValueError, match="heads are made for its 17 tokens; change the base model's"):
        model.resize_token_embeddings(**change)
    with pytest.raises(ValueError, match="heads are made for its 17 tokens"):
        model.set_input_embeddings(torch.nn.Embedding(20, 64))
    assert model.resize_token_embeddings(17) is model.get_input_embeddings()
    same_weights(model.model, wrapped("common").model)


def test_a_loss_that_trains_nothing_says_how_heads_train() -> None:
    model, ids_BT = wrap(copy.deepcopy(wrapped("common").model)).train(), torch.tensor([[1, 2, 5, 3]])
    with pytest.raises(ValueError, match="the frozen target's and trains nothing; heads train with cpdlm speed-up"):
        model(input_ids=ids_BT, labels=ids_BT)
    assert model.eval()(input_ids=ids_BT, labels=ids_BT).loss > 0
