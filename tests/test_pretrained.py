"""Pretrained models as frozen trunks: their logits, their greedy text, and back from an exported folder bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from made_pretrained import (
    CONTEXT,
    GEMMA,
    GROUPED,
    SHAPES,
    SMALL,
    V,
    continued,
    loaded,
    prompts,
    saved,
    settings,
    with_heads,
)
from tokenizers import Tokenizer as TokenizerModel
from tokenizers.models import WordLevel
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from cpdlm.bench.contenders import hugging_face
from cpdlm.config import ConfigError, resolve
from cpdlm.data.pretrained_files import checkpoint_folder
from cpdlm.data.tokenizer import HubTokenizer
from cpdlm.decoding import Sampling, decode, decode_batch
from cpdlm.hf import CpdlmForCausalLM, export
from cpdlm.hf.load import Loaded
from cpdlm.model.losses.draft import Objective

GREEDY = Sampling(0.0)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_target_is_the_models_own_distribution(name: str, dtype: torch.dtype, pretrained: dict[str, Path]) -> None:
    base = loaded(pretrained[name], dtype)
    whole = AutoModelForCausalLM.from_pretrained(pretrained[name], dtype=dtype).eval()
    tokens_BT = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(3))
    near, some = 1e-5 if dtype == torch.float32 else 0.02, torch.tensor([5, 3, 60])
    for model in (base, with_heads(base), with_heads(base, link="first")):
        with torch.inference_mode():
            hidden_BTD, theirs = model.hidden(tokens_BT), whole(tokens_BT).logits.float()
            ours = model.target_logits(hidden_BTD, model.unembedding.weight).float()
            log_probs = model.target_log_probs(hidden_BTD).float()
            if model.heads is not None:
                model.use_draft_vocabulary(some)
            drafted = model.target_logits(hidden_BTD, model._draft_table).float()
        largest = float(theirs.abs().max())
        assert_close(ours, theirs, rtol=near, atol=near * largest)
        assert_close(drafted, theirs if model is base else theirs[..., some], rtol=near, atol=near * largest)
        assert_close(log_probs, theirs.log_softmax(-1), rtol=near, atol=near * max(1.0, largest))
    assert base.embeddings_are_tied == bool(whole.config.tie_word_embeddings)


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_text_is_that_of_generate(name: str, pretrained: dict[str, Path]) -> None:
    model = with_heads(loaded(pretrained[name]), link="first")
    whole, shared = AutoModelForCausalLM.from_pretrained(pretrained[name]).eval(), hugging_face(model)
    assert shared is not None
    asked = prompts(3, 9, 6)
    for prompt_T, row in zip(asked, decode_batch(model, asked, 24, GREEDY), strict=True):
        theirs = continued(whole, prompt_T, 24)
        assert row.tokens == theirs == shared(prompt_T, 24, GREEDY, 0)
        assert decode(model, prompt_T, 24, GREEDY).tokens == theirs


LONGER = {name: SHAPES[name] for name in ("llama tied", "gpt2", "opt, which makes its own masks")} | {
    "a window in all layers": MistralConfig(**GROUPED, sliding_window=16),
    "a window in some layers": Gemma2Config(**GEMMA, sliding_window=16),
}


@pytest.mark.parametrize("name", LONGER)
def test_it_decodes_as_far_as_the_model_goes_however_short_it_was_trained(name: str, tmp_path: Path) -> None:
    folder = saved(LONGER[name], tmp_path / "model")
    model = with_heads(loaded(folder, context=16), **{"data.context": 16, "link": "first"})
    assert model.context == 64
    prompt_T = torch.tensor([5, 6, 7])
    theirs = continued(AutoModelForCausalLM.from_pretrained(folder).eval(), prompt_T, 61)
    assert decode(model, prompt_T, 61, GREEDY).tokens == theirs
    with pytest.raises(ValueError, match="exceed the model's context of 64; pass max_new_tokens of at most 61"):
        decode(model, prompt_T, 62, GREEDY)
    CpdlmForCausalLM.from_language_model(model, 1, 2).save_pretrained(tmp_path / "fast")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    assert again.config.max_position_embeddings == again.model.context == 64
    assert continued(again, prompt_T, 61) == theirs


def test_a_prompt_holds_any_id_that_is_embedded(tmp_path: Path) -> None:
    """The table of outputs may be shorter; and a config may ask for tuples, which nothing here reads."""
    folder = saved(SHAPES["llama untied"], tmp_path, return_dict=False)
    base = loaded(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, return_dict=True).eval()
    longer = torch.nn.Embedding.from_pretrained(torch.cat([base.trunk.embedding, torch.randn(3, 32)]))
    base.trunk.body.set_input_embeddings(longer)
    whole.set_input_embeddings(longer)
    prompt_T = torch.tensor([V + 2, 5, V])
    assert decode(with_heads(base), prompt_T, 9, GREEDY).tokens == continued(whole, prompt_T, 9)
    with pytest.raises(ValueError, match=f"token id {V + 3}, the vocabulary is 0..{V + 2}"):
        decode(with_heads(base), torch.tensor([V + 3]), 9, GREEDY)


def test_rotary_frequencies_that_change_with_the_length_bound_the_context(tmp_path: Path) -> None:
    """Keys in a cache keep the frequencies that they were made with; up to there the text is that of generate."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    shape = LlamaConfig(**GROUPED, rope_parameters=rope | {"original_max_position_embeddings": 32})
    folder, prompt_T = saved(shape, tmp_path), torch.tensor([5, 6, 7])
    model = with_heads(loaded(folder, context=16), **{"data.context": 16})
    assert model.context == 32
    theirs = continued(AutoModelForCausalLM.from_pretrained(folder).eval(), prompt_T, 29)
    assert decode(model, prompt_T, 29, GREEDY).tokens == theirs
    with pytest.raises(ConfigError, match="has a context of 32 tokens; lower data.context=48"):
        loaded(folder)


def test_where_the_config_names_no_context_the_rows_say_it(tmp_path: Path) -> None:
    assert loaded(saved(SHAPES["llama tied"], tmp_path, max_position_embeddings=-1)).context == CONTEXT


@pytest.mark.parametrize(
    "shape",
    [
        BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
        FalconConfig(**SMALL, alibi=True),
        FalconConfig(**SMALL, alibi=True, new_decoder_architecture=True, num_kv_heads=2),
        MptConfig(vocab_size=V, d_model=48, n_layers=2, n_heads=6, max_seq_len=64, attn_config={"clip_qkv": 1.0}),
    ],
    ids=["bloom", "falcon", "falcon of groups", "mpt of six heads"],
)
def test_positions_by_alibi_are_exact(shape: PreTrainedConfig, tmp_path: Path) -> None:
    """Their biases count the slots of the cache, dead ones and those of other documents and branches too."""
    folder = saved(shape, tmp_path / "model")
    model, whole = with_heads(loaded(folder), link="first"), AutoModelForCausalLM.from_pretrained(folder).eval()
    asked = prompts(3, 9, 6)
    theirs = [continued(whole, prompt_T, 30) for prompt_T in asked]
    for draft in ("chain", "tree"):
        assert [row.tokens for row in decode_batch(model, asked, 30, GREEDY, draft=draft)] == theirs
        assert decode(model, asked[0], 30, GREEDY, draft=draft).tokens == theirs[0]
    indices_BT = torch.cat([torch.arange(9), torch.arange(6)])[None]
    with torch.inference_mode():
        row_BTD = model.hidden(torch.cat(asked[1:])[None], indices_BT)
        assert_close(row_BTD[:, 9:], model.hidden(asked[2][None]), rtol=1e-4, atol=1e-4)
    CpdlmForCausalLM.from_language_model(model, 1, 2).save_pretrained(tmp_path / "fast")
    assert continued(AutoModelForCausalLM.from_pretrained(tmp_path / "fast"), asked[1], 30) == theirs[1]


def test_a_frozen_trunk_has_no_dropout_while_its_heads_train(pretrained: dict[str, Path]) -> None:
    model = with_heads(loaded(pretrained["gpt2"])).train()
    tokens_BT = torch.arange(3, 19).unsqueeze(0)
    assert torch.equal(model.hidden(tokens_BT), model.hidden(tokens_BT))
    assert model.heads is not None and model.heads.training


def test_an_identity_head_ranks_tokens_as_the_target_does(pretrained: dict[str, Path]) -> None:
    base = loaded(pretrained["cohere, scaled logits"])
    model, hidden_PD = with_heads(base, **{"rank": 1, "model.noise": 0.0}), torch.randn(5, base.trunk.width)
    drafts = model.joint(hidden_PD).log_factors_NRV[:, 0, 0]
    assert_close(drafts, model.target_log_probs(hidden_PD), rtol=1e-5, atol=1e-5)


def test_heads_are_wider_than_a_narrow_trunk(pretrained: dict[str, Path]) -> None:
    model = with_heads(loaded(pretrained["llama tied"], torch.bfloat16))
    assert model.heads is not None and model.heads.gate.weight.dtype == torch.float32
    tokens_BT, future_BTN = torch.randint(0, V, (2, 8)), torch.randint(0, V, (2, 8, 4))
    indices_BT, successors_BT = torch.arange(8).expand(2, 8), torch.full((2, 8), 4)
    weights = torch.zeros(2, 8), torch.ones(2, 8)
    terms = model(tokens_BT, indices_BT, future_BTN, successors_BT, *weights, objective=Objective("blend"))
    terms.loss.backward()
    assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in model.heads.maps.values())
    assert len(decode(model, torch.tensor([3, 4]), 12, Sampling(0.9), torch.Generator().manual_seed(0)).tokens) == 12


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in SHAPES), *((name, torch.bfloat16) for name in ("llama tied", "gpt2"))],
)
def test_an_exported_model_comes_back_bit_for_bit(
    name: str, dtype: torch.dtype, pretrained: dict[str, Path], tmp_path: Path
) -> None:
    model = with_heads(loaded(pretrained[name], dtype), link="first")
    CpdlmForCausalLM.from_language_model(model, 1, 2).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).model
    theirs = dict(again.named_parameters())
    for key, parameter in model.named_parameters():
        assert parameter.dtype == theirs[key].dtype and torch.equal(parameter, theirs[key]), key
        # In a mapped file tensors stand where they happen to, and the rounding of a product depends on where that is.
        theirs[key].data = theirs[key].data.clone()
    prompt_T, tokens_BT = torch.tensor([5, 6, 7]), torch.randint(0, V, (1, 9))
    assert decode(again, prompt_T, 8, GREEDY).tokens == decode(model, prompt_T, 8, GREEDY).tokens
    with torch.inference_mode():
        hidden_BTD = model.hidden(tokens_BT)
        assert torch.equal(again.target_log_probs(again.hidden(tokens_BT)), model.target_log_probs(hidden_BTD))
        drafts = [each.draft_joint(hidden_BTD[:, -1], tokens_BT[:, -1]).log_factors_NRV for each in (again, model)]
        assert torch.equal(*drafts)


def test_an_export_does_without_options_what_its_base_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling, penalties and ids are the base model's; a batch of its tokenizer can be continued."""
    base = saved(LlamaConfig(**GROUPED), tmp_path / "base")
    chosen: dict[str, Any] = {"temperature": 0.7, "top_p": 1e-6, "do_sample": True, "repetition_penalty": 1.4}
    chosen |= {"max_new_tokens": 12, "bos_token_id": None, "eos_token_id": [2, 7], "pad_token_id": 1}
    GenerationConfig(**chosen).save_pretrained(base)
    words = TokenizerModel(WordLevel({"a" * (index + 1): index for index in range(V)}, unk_token="aaaa"))
    ends = {"eos_token": "aaa", "unk_token": "aaaa", "padding_side": "right"}
    PreTrainedTokenizerFast(tokenizer_object=words, **ends).save_pretrained(base)
    run = Loaded(with_heads(loaded(base)), HubTokenizer("model", base), [2, 7], resolve(settings(str(base))))
    monkeypatch.setattr(export, "load", lambda source: run)
    export.export(tmp_path / "run", tmp_path / "mine")
    folders = tmp_path / "mine", base
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    told, said = (each.generation_config.to_diff_dict() for each in (ours, theirs))
    assert told == said and told["pad_token_id"] == 1 and told["repetition_penalty"] == 1.4
    tokens = AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert (tokens.padding_side, tokens.pad_token_id) == ("left", 2)
    rows = {"input_ids": torch.tensor([[2, 2, 5, 6], [8, 5, 9, 11]])}
    rows["attention_mask"] = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert ours.generate(**rows).tolist() == theirs.generate(**rows).tolist()


@pytest.mark.slow
def test_smollm2_is_a_language_model_and_decodes_as_generate_does() -> None:
    folder = Path(checkpoint_folder("smollm2", ".cache/cpdlm"))
    loaded(folder, torch.bfloat16, 256, "smollm2")  # as it is decoded with: its rounding is no fault of the model's
    base, tokenizer = loaded(folder, torch.float32, 256, "smollm2"), HubTokenizer("model", folder)
    assert base.embeddings_are_tied and base.vocab_size == tokenizer.vocab_size == 49152

    def ids(text: str) -> torch.Tensor:
        return torch.tensor([tokenizer.bos, *tokenizer.encode([text])[0]])

    ids_T = ids(
        "The Moon is Earth's only natural satellite. It orbits at an average distance of 384,400 kilometres, about "
        "thirty times the diameter of Earth, and always shows the same side to it, because it turns once on its axis "
        "in each orbit."
    )
    with torch.inference_mode():
        log_probs = base.target_log_probs(base.hidden(ids_T[None, :-1]))[0]
    nll = -float(log_probs.gather(-1, ids_T[1:, None]).mean())
    assert 1.5 < nll < 3.2, f"{nll} nats per token"  # noise has 10.8
    model = with_heads(base, **{"rank": 2, "horizon": 3, "data.context": 256})
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt in ("def main(", "The capital of France", "import numpy as np\n\n"):
        assert decode(model, ids(prompt), 32, GREEDY).tokens == continued(whole, ids(prompt), 32), prompt
