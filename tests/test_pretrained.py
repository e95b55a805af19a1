"""Pretrained models as frozen trunks: their logits, their greedy text, and a clear word where they will not do."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer as TokenizerModel
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BloomConfig,
    CohereConfig,
    DistilBertConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cpdlm.bench.contenders import hugging_face
from cpdlm.config import Config, ConfigError, parse, resolve
from cpdlm.data.pretrained_files import ORIGIN, checkpoint_folder, content_hash, described, eos_of
from cpdlm.data.tokenizer import HubTokenizer, tokenizer_hash
from cpdlm.decoding import Sampling, decode, decode_batch
from cpdlm.hf import CpdlmForCausalLM, export
from cpdlm.hf.load import Loaded
from cpdlm.model.language_model import LanguageModel, build_language_model
from cpdlm.model.pretrained import load_pretrained
from cpdlm.training.plan import make_plan

V, CONTEXT = 67, 48
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
SHAPES: dict[str, PreTrainedConfig] = {
    "llama tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama untied": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**GROUPED),
    "opt, which makes its own masks": OPTConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gemma2, capped logits": Gemma2Config(
        **GROUPED, final_logit_softcapping=2.0, attn_logit_softcapping=20.0, sliding_window=64, query_pre_attn_scalar=8
    ),
    "granite, divided logits": GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=3.0),
    "cohere, scaled logits": CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.25),
}


def saved(shape: PreTrainedConfig, folder: Path, **changes: Any) -> Path:
    """A small random model whose logits are far enough apart for its scale and cap to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    if changes:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def with_heads(base: LanguageModel, **more: Any) -> LanguageModel:
    settings = {
        "rank": 3,
        "horizon": 4,
        "data.context": CONTEXT,
        "decode.prompt_tokens": 4,
        "decode.new_tokens": 4,
        "model.trunk": "x",
        "model.family": "pretrained",
        "data.tokenizer": "model",
    }
    torch.manual_seed(1)
    return build_language_model(resolve(settings | more), V, base).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: saved(shape, tmp_path_factory.mktemp("model")) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_target_is_the_models_own_distribution(name: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    base = load_pretrained(str(folders[name]), dtype, CONTEXT)
    whole = AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype).eval()
    tokens_BT = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(3))
    for model in (base, with_heads(base), with_heads(base, anchor="token")):
        with torch.inference_mode():
            hidden_BTD = model.hidden(tokens_BT)
            theirs = whole(tokens_BT).logits.float()
            ours = model.target_logits(hidden_BTD, model.unembedding.weight).float()
            log_probs = model.target_log_probs(hidden_BTD).float()
        near = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near * float(theirs.abs().max()))
        torch.testing.assert_close(
            log_probs, theirs.log_softmax(-1), rtol=near, atol=near * max(1.0, float(theirs.abs().max()))
        )
    assert base.embeddings_are_tied == bool(whole.config.tie_word_embeddings)


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_text_is_that_of_generate(name: str, folders: dict[str, Path]) -> None:
    base = load_pretrained(str(folders[name]), torch.float32, CONTEXT)
    model = with_heads(base, anchor="token")
    whole = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    prompts = [torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(length)) for length in (3, 9, 6)]
    rows = decode_batch(model, prompts, 24, Sampling(0.0))
    shared = hugging_face(model)
    assert shared is not None
    for prompt_T, row in zip(prompts, rows, strict=True):
        theirs = whole.generate(
            prompt_T[None],
            attention_mask=torch.ones_like(prompt_T[None]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )[0, len(prompt_T) :].tolist()
        assert row.tokens == theirs == shared(prompt_T, 24, Sampling(0.0), 0)
        assert decode(model, prompt_T, 24, Sampling(0.0)).tokens == theirs


LONGER = SHAPES | {
    "a window in all layers": MistralConfig(**GROUPED, sliding_window=16),
    "a window in some layers": Gemma2Config(**GROUPED, sliding_window=16, query_pre_attn_scalar=8),
}


@pytest.mark.parametrize("name", LONGER)
def test_it_decodes_as_far_as_the_model_goes_however_short_it_was_trained(name: str, tmp_path: Path) -> None:
    folder = saved(LONGER[name], tmp_path / "model")
    model = with_heads(load_pretrained(str(folder), torch.float32, 16), **{"data.context": 16, "anchor": "token"})
    assert model.context == 64
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt_T = torch.tensor([5, 6, 7])
    theirs = whole.generate(
        prompt_T[None],
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        max_new_tokens=61,
        do_sample=False,
        eos_token_id=None,
    )[0, 3:].tolist()
    assert decode(model, prompt_T, 61, Sampling(0.0)).tokens == theirs
    with pytest.raises(ValueError, match="exceed the model's context of 64; pass max_new_tokens of at most 61"):
        decode(model, prompt_T, 62, Sampling(0.0))
    CpdlmForCausalLM.from_language_model(model, 1, 2).save_pretrained(tmp_path / "fast")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    assert loaded.config.max_position_embeddings == loaded.model.context == 64
    assert (
        loaded.generate(prompt_T[None], max_new_tokens=61, do_sample=False, eos_token_id=None)[0, 3:].tolist() == theirs
    )


def test_a_prompt_holds_any_id_that_is_embedded(tmp_path: Path) -> None:
    """The table of outputs may be shorter; and a config may ask for tuples, which nothing here reads."""
    folder = saved(SHAPES["llama untied"], tmp_path, return_dict=False)
    base = load_pretrained(str(folder), torch.float32, CONTEXT)
    whole = AutoModelForCausalLM.from_pretrained(folder, return_dict=True).eval()
    longer = torch.nn.Embedding.from_pretrained(torch.cat([base.trunk.embedding, torch.randn(3, 32)]))
    base.trunk.body.set_input_embeddings(longer)
    whole.set_input_embeddings(longer)
    prompt_T = torch.tensor([V + 2, 5, V])
    theirs = whole.generate(prompt_T[None], max_new_tokens=9, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    assert decode(with_heads(base), prompt_T, 9, Sampling(0.0)).tokens == theirs
    with pytest.raises(ValueError, match=f"token id {V + 3}, the vocabulary is 0..{V + 2}"):
        decode(with_heads(base), torch.tensor([V + 3]), 9, Sampling(0.0))


def test_rotary_frequencies_that_change_with_the_length_bound_the_context(tmp_path: Path) -> None:
    """Keys in a cache keep the frequencies that they were made with; on the shorter side the text is that of generate."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    shape = LlamaConfig(**GROUPED, rope_parameters=rope | {"original_max_position_embeddings": 32})
    folder = str(saved(shape, tmp_path))
    model = with_heads(load_pretrained(folder, torch.float32, 16), **{"data.context": 16})
    assert model.context == 32
    whole, prompt_T = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.tensor([5, 6, 7])
    theirs = whole.generate(prompt_T[None], max_new_tokens=29, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    assert decode(model, prompt_T, 29, Sampling(0.0)).tokens == theirs
    with pytest.raises(ConfigError, match="has a context of 32 tokens; lower data.context=48"):
        load_pretrained(folder, torch.float32, CONTEXT)


def test_where_the_config_names_no_context_the_rows_say_it(tmp_path: Path) -> None:
    folder = saved(SHAPES["llama tied"], tmp_path, max_position_embeddings=-1)
    assert load_pretrained(str(folder), torch.float32, CONTEXT).context == CONTEXT


@pytest.mark.parametrize("name", SHAPES)
def test_documents_of_a_row_do_not_see_each_other(name: str, folders: dict[str, Path]) -> None:
    base = load_pretrained(str(folders[name]), torch.float32, CONTEXT)
    one_BT, two_BT = (torch.randint(3, V, (2, size), generator=torch.Generator().manual_seed(size)) for size in (7, 9))
    indices_BT = torch.cat([torch.arange(7), torch.arange(9)]).expand(2, 16)
    with torch.inference_mode():
        row_BTD = base.hidden(torch.cat([one_BT, two_BT], dim=1), indices_BT)
        torch.testing.assert_close(row_BTD[:, :7], base.hidden(one_BT), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(row_BTD[:, 7:], base.hidden(two_BT), rtol=1e-4, atol=1e-4)


def test_a_frozen_trunk_has_no_dropout_while_its_heads_train(folders: dict[str, Path]) -> None:
    model = with_heads(load_pretrained(str(folders["gpt2"]), torch.float32, CONTEXT)).train()
    tokens_BT = torch.arange(3, 19).unsqueeze(0)
    torch.testing.assert_close(model.hidden(tokens_BT), model.hidden(tokens_BT), rtol=0, atol=0)
    assert model.heads is not None and model.heads.training


def test_an_identity_head_ranks_tokens_as_the_target_does(folders: dict[str, Path]) -> None:
    base = load_pretrained(str(folders["cohere, scaled logits"]), torch.float32, CONTEXT)
    model = with_heads(base, **{"rank": 1, "model.noise": 0.0})
    hidden_PD = torch.randn(5, base.trunk.width)
    torch.testing.assert_close(
        model.joint(hidden_PD).log_factors_NRV[:, 0, 0], model.target_log_probs(hidden_PD), rtol=1e-5, atol=1e-5
    )


def test_heads_are_wider_than_a_narrow_trunk(folders: dict[str, Path]) -> None:
    base = load_pretrained(str(folders["llama tied"]), torch.bfloat16, CONTEXT)
    model = with_heads(base)
    assert model.heads is not None and model.heads.gate.weight.dtype == torch.float32
    batch = {"tokens_BT": torch.randint(0, V, (2, 8)), "position_ids_BT": torch.arange(8).expand(2, 8)}
    terms = model(
        **batch,
        future_BTN=torch.randint(0, V, (2, 8, 4)),
        successors_BT=torch.full((2, 8), 4),
        first_weight_BT=torch.zeros(2, 8),
        rest_weight_BT=torch.ones(2, 8),
        objective=("blend", 0.9, 1.0),
    )
    terms.loss.backward()
    assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in model.heads.maps.values())
    out = decode(model, torch.tensor([3, 4]), 12, Sampling(0.9), torch.Generator().manual_seed(0))
    assert len(out.tokens) == 12


REFUSED = {
    "an encoder": (BertConfig(**SMALL), "is not causal: earlier tokens see later ones"),
    "state space": (
        MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
        "cannot be cropped",
    ),
    "ALiBi": (BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4), "is a bloom model with ALiBi"),
    "no cache": (OpenAIGPTConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=4), "has no key-value cache"),
    "a biased output": (PhiConfig(**SMALL), "its logits are not softcap"),
    "masks of its own": (
        GPTNeoConfig(
            vocab_size=V,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            max_position_embeddings=64,
        ),
        "does not take masks and positions as they are",
    ),
    "half an encoder-decoder": (
        BartConfig(
            vocab_size=V,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            max_position_embeddings=64,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
        ),
        "has no body that can be run without its output layer",
    ),
    "a window in all layers": (MistralConfig(**GROUPED, sliding_window=16), "lower data.context to 16"),
    "a window": (
        Gemma2Config(**GROUPED, sliding_window=16, query_pre_attn_scalar=8),
        "lower data.context to 16",
    ),
    "too short": (
        GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=4, n_positions=32),
        "has a context of 32 tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_decoding_cannot_rely_on_is_refused_by_name(name: str, tmp_path: Path) -> None:
    shape, message = REFUSED[name]
    folder = saved(shape, tmp_path)
    if name == "a biased output":
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.nn.init.normal_(model.lm_head.bias, std=1e-6)  # less than a probe can tell
        model.save_pretrained(folder)
    with pytest.raises(ConfigError, match=message) as raised:
        load_pretrained(str(folder), torch.float32, CONTEXT, "my-model")
    assert "model=my-model" in str(raised.value)


def test_encoders_with_or_without_a_decoder_are_no_causal_models(tmp_path: Path) -> None:
    for shape in (T5Config(vocab_size=V), BartConfig(is_encoder_decoder=True), DistilBertConfig(vocab_size=V)):
        shape.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=f"is a {shape.model_type} model, not a causal language model"):
            load_pretrained(str(tmp_path), torch.float32, CONTEXT)


def test_a_model_larger_than_memory_is_refused_before_it_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folders["llama tied"] / "config.json").read_text())  # no weights at all
    with pytest.raises(ConfigError, match=r"0.00B parameters.*float32.*model.dtype=bfloat16 takes.*parameters fit"):
        load_pretrained(str(tmp_path), torch.float32, CONTEXT, available_bytes=1000)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_pretrained(str(tmp_path), torch.float32, CONTEXT)


def test_absurd_layer_counts_are_refused_before_they_are_built(folders: dict[str, Path], tmp_path: Path) -> None:
    shape = json.loads((folders["llama tied"] / "config.json").read_text())
    shape.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 10**9}))
    with pytest.raises(
        ConfigError, match=r"has 1,000,000,000 layers by its config.json, at least [\d,]+ GiB, and .* free"
    ):
        load_pretrained(str(tmp_path), torch.float32, CONTEXT)
    with pytest.raises(ConfigError, match=r"has 1,000,000,000 layers by its config.json"):
        make_plan(parse([f"model={tmp_path}", "data.tokenizer=model"]))


@pytest.mark.parametrize(
    "packed, how, package",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits", "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits", "optimum"),
    ],
)
def test_a_quantised_checkpoint_that_cannot_be_read_says_what_to_give(
    packed: dict[str, Any], how: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quantiser, asked in (("bnb_4bit", "is_bitsandbytes_available"), ("gptq", "is_optimum_available")):
        monkeypatch.setattr(f"transformers.quantizers.quantizer_{quantiser}.{asked}", lambda *_: False)
    folder = saved(SHAPES["llama tied"], tmp_path, quantization_config=packed)
    with pytest.raises(ConfigError) as raised:
        load_pretrained(str(folder), torch.float32, CONTEXT, "mine")
    assert re.fullmatch(
        rf"model=mine cannot be loaded: .*requires {package}.*; it is quantised \({how}\): give the checkpoint that it was "
        "made from, unquantised, or a GGUF file of it",
        str(raised.value),
    )


def test_weights_of_a_quantisation_that_is_not_known_are_no_torn_download(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(SHAPES["llama untied"], tmp_path, quantization_config={"quant_method": "strange"})
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.qweight"] = weights.pop("lm_head.weight").to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"weights lack \['lm_head.weight'\]; it is quantised \(strange\): give the"):
        load_pretrained(str(folder), torch.float32, CONTEXT)


def test_a_kind_that_the_library_does_not_know_is_called_by_its_name(tmp_path: Path) -> None:
    for content, said in (({"model_type": "foo9"}, "its model_type is foo9"), ({}, "has no model_type")):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=f"{said}, which transformers .* does not know; install a release"):
            load_pretrained(str(tmp_path), torch.float32, CONTEXT)


@pytest.mark.parametrize("reachable", [True, False])
def test_a_name_is_asked_for_once(reachable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself retries for half a minute."""
    asked = []

    def answer(self: HfApi, name: str, timeout: float) -> None:
        asked.append(name)
        if reachable:
            raise HFValidationError("no such name")
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", answer)
    said = "no such model on the hub" if reachable else r"the hub cannot be reached \(name or service not known\)"
    with pytest.raises(ConfigError, match=f"model=some-{reachable}: there is no such folder here, and {said}"):
        checkpoint_folder(f"some-{reachable}", str(tmp_path))
    with pytest.raises(ConfigError, match=f"data.tokenizer=hf:x: there is no such folder here, and {said}"):
        HubTokenizer("hf:x", f"other-{reachable}")
    assert asked == [f"some-{reachable}", f"other-{reachable}"]


def test_a_name_that_is_nowhere_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model=.*cannot be found, or is gated.*hf auth login"):
        load_pretrained(str(tmp_path / "nothing"), torch.float32, CONTEXT)


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal, and take what a pipe says for the answer."""
    monkeypatch.setattr("sys.stdin", io.StringIO("yes, this is a prompt\n"))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "theirs", "auto_map": {"AutoConfig": "code.Theirs", "AutoTokenizer": "code.Words"}})
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Words", None]}}))
    (tmp_path / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'touched')!r})\n")
    for load in (
        lambda: load_pretrained(str(tmp_path), torch.float32, CONTEXT),
        lambda: HubTokenizer("hf:theirs", tmp_path),
        lambda: build_language_model(resolve({"model.family": str(tmp_path / "config.json")}), V),
    ):
        with pytest.raises(ConfigError, match=r"(model|data.tokenizer|family)=.* brings code of its own"):
            load()
    assert sys.stdin.read().startswith("yes") and not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "reason", ["You are trying to access a gated repo.\nMake sure", "owner/none is not a model identifier"]
)
def test_a_gated_or_missing_hub_name_says_what_the_hub_said(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(reason)  # what the library makes of the hub's errors

    monkeypatch.setattr("cpdlm.model.pretrained.AutoConfig.from_pretrained", refuse)
    with pytest.raises(ConfigError) as raised:
        load_pretrained("owner/none", torch.float32, CONTEXT)
    said = reason.splitlines()[0].rstrip(".")
    assert f"model=owner/none cannot be found, or is gated: {said}. Give a Hugging Face folder" in str(raised.value)


def test_a_model_without_an_output_embedding_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(ConfigError, match=r"model=mine \(LlamaForCausalLM\) has no output embedding"):
        load_pretrained(str(folders["llama tied"]), torch.float32, CONTEXT, "mine")


def test_a_folder_that_is_no_model_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder without a config.json; give a Hugging Face folder"):
        load_pretrained(str(tmp_path), torch.float32, CONTEXT)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="it is a run of this program: type model.trunk="):
        load_pretrained(str(tmp_path), torch.float32, CONTEXT)


def test_weights_that_are_cut_off_are_refused(tmp_path: Path) -> None:
    path = saved(SHAPES["gpt2"], tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be loaded: .*; give a folder with whole safetensors weights"):
        load_pretrained(str(tmp_path), torch.float32, CONTEXT)


def test_weights_that_are_not_whole_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((folders["llama untied"] / name).read_text())
    weights = load_file(folders["llama untied"] / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"is not whole: its weights lack \['lm_head.weight'\]"):
        load_pretrained(str(tmp_path), torch.float32, CONTEXT)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_itself_and_a_hub_name_is_left_alone(tmp_path: Path) -> None:
    assert checkpoint_folder(str(tmp_path), str(tmp_path / "cache")) == str(tmp_path)
    assert checkpoint_folder("owner/name", str(tmp_path / "cache")) == "owner/name"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not a GGUF file, or it is cut off"),
        (b"GGU", "is not a GGUF file, or it is cut off"),
        (b"PK\x03\x04 a zip file", "is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 272, 40) + b"\x04\x00", "cannot be read .*download it again"),
    ],
)
def test_a_gguf_that_is_cut_off_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        checkpoint_folder(str(path), str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*")) or not list((tmp_path / "cache" / "models").iterdir())


TOKENS = [*["<|endoftext|>", "<s>", "</s>", *bytes_to_unicode().values()][: V - 1], '!"']


def written_as_gguf(model: PreTrainedModel, path: Path) -> Path:
    """A Qwen2 as llama.cpp writes it, unquantised; its tokenizer knows single bytes."""
    shape, arch = model.config, gguf.MODEL_ARCH.QWEN2
    names = gguf.get_tensor_name_map(arch, shape.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (V - 3)])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_becomes_an_ordinary_folder_once(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    path = written_as_gguf(whole, tmp_path / "my model.gguf")
    cache = tmp_path / "cache"
    folder = Path(checkpoint_folder(str(path), str(cache)))
    origin = json.loads((folder / ORIGIN).read_text())
    assert origin["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and folder.parent == cache / "models"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = load_pretrained(str(folder), torch.float32, CONTEXT)
    tokens_BT = torch.randint(0, V, (1, 9))
    with torch.inference_mode():
        ours = model.target_logits(model.hidden(tokens_BT), model.unembedding.weight)
        torch.testing.assert_close(ours, whole(tokens_BT).logits, rtol=1e-5, atol=1e-5)
    tokenizer = HubTokenizer("model", folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 2, V)
    assert tokenizer.decode(tokenizer.encode(["#%*"])[0]) == "#%*"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    checkpoint_folder.cache_clear()
    assert checkpoint_folder(str(path), str(cache)) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.999])
def test_a_gguf_that_is_cut_off_anywhere_is_refused(share: float, folders: dict[str, Path], tmp_path: Path) -> None:
    path = written_as_gguf(AutoModelForCausalLM.from_pretrained(folders["qwen2"]), tmp_path / "whole.gguf")
    content = path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConfigError, match=r"cut.gguf cannot be read .*cut off \(download it again\)"):
        checkpoint_folder(str(tmp_path / "cut.gguf"), str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_a_gguf_larger_than_memory_is_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written_as_gguf(AutoModelForCausalLM.from_pretrained(folders["qwen2"]), tmp_path / "large.gguf")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ConfigError, match=r"large.gguf has 0.00B parameters; dequantising them takes .* are free"):
        checkpoint_folder(str(path), str(tmp_path / "cache"))


def test_without_psutil_it_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ConfigError, match=r"model=mine: the package psutil says .* type pip install psutil"):
        load_pretrained(str(folders["gpt2"]), torch.float32, CONTEXT, "mine")


def test_a_gguf_without_its_packages_says_what_to_type(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written_as_gguf(AutoModelForCausalLM.from_pretrained(folders["qwen2"]), tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="type pip install gguf accelerate"):
        checkpoint_folder(str(path), str(tmp_path / "cache"))


def test_hashes_follow_content(folders: dict[str, Path], tmp_path: Path) -> None:
    one, copy = folders["gpt2"], tmp_path / "copy"
    shutil.copytree(one, copy)
    assert content_hash(str(one)) == content_hash(str(copy)) != content_hash(str(folders["qwen2"]))
    assert content_hash("owner/name") != content_hash("owner/other")
    made = [
        PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(each), eos_token="a") for each in ("ab", "ab", "ac")
    ]
    for number, each in enumerate(made):
        each.save_pretrained(tmp_path / str(number))
    hashes = [tokenizer_hash(str(tmp_path / str(number))) for number in range(3)]
    assert hashes[0] == hashes[1] != hashes[2]
    # What only changes prompts changes them for the right model.
    made[0].chat_template = "{{ messages[0]['content'] }}"
    made[0].save_pretrained(tmp_path / "template")
    model = word_tokenizer("ab")
    model.post_processor = TemplateProcessing(single="b $A", special_tokens=[("b", model.token_to_id("b"))])
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="a").save_pretrained(tmp_path / "begun")
    assert len({hashes[0], tokenizer_hash(str(tmp_path / "template")), tokenizer_hash(str(tmp_path / "begun"))}) == 3


def test_a_text_ends_where_generate_stops(tmp_path: Path) -> None:
    """By the generation configuration, or without one by the model's own."""
    folder = saved(SHAPES["llama tied"], tmp_path, eos_token_id=[2, 7])
    assert eos_of(str(folder)) == 2, "config.json is not asked"
    GenerationConfig(eos_token_id=[5, 9]).save_pretrained(folder)
    assert eos_of(str(folder)) == AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [5, 9]
    (folder / "generation_config.json").unlink()
    assert eos_of(str(folder)) == AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [2, 7]


def test_what_is_known_of_a_model_is_what_its_source_says(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert described("owner/name", "owner/name") == {"base_model": "owner/name"}
    assert described("smollm2", folder) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
    }
    assert described(folder, folder) == {}
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: mine\ntags: [a]\nbase_model: x/y\n---\n# A model\n")
    assert described(folder, folder) == {"license": "other", "license_name": "mine"}
    card.write_text("---\nlicense: mit\n---\n")
    assert described("owner/name", folder) == {"base_model": "owner/name", "license": "mit"}
    for damaged in ("---\nlicense: [\n---\n", "---\njust text\n---\n", "# no front matter"):
        card.write_text(damaged)
        assert described(folder, folder) == {}


def word_tokenizer(words: str) -> TokenizerModel:
    return TokenizerModel(WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))


@pytest.mark.slow
def test_smollm2_is_a_language_model_and_decodes_as_generate_does() -> None:
    folder = checkpoint_folder("smollm2", ".cache/cpdlm")
    load_pretrained(
        folder, torch.bfloat16, 256, "smollm2"
    )  # as it is decoded with; its rounding is no fault of the model's
    base = load_pretrained(folder, torch.float32, 256, "smollm2")
    tokenizer = HubTokenizer("model", folder)
    assert base.embeddings_are_tied and base.vocab_size == tokenizer.vocab_size == 49152
    text = (
        "The Moon is Earth's only natural satellite. It orbits at an average distance of 384,400 kilometres, about thirty times "
        "the diameter of Earth, and always shows the same side to it, because it turns once on its axis in each orbit."
    )
    ids_T = torch.tensor([tokenizer.bos, *tokenizer.encode([text])[0]])
    with torch.inference_mode():
        log_probs = base.target_log_probs(base.hidden(ids_T[None, :-1]))[0]
        perplexity = float(-log_probs.gather(-1, ids_T[1:, None]).mean()).__round__(3)
    assert 1.5 < perplexity < 3.2, f"{perplexity} nats per token"  # noise has 10.8
    settings = {
        "rank": 2,
        "horizon": 3,
        "data.context": 256,
        "model.trunk": "x",
        "model.family": "pretrained",
        "data.tokenizer": "model",
    }
    model = build_language_model(resolve(settings), base.vocab_size, base).eval()
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt in ("def main(", "The capital of France", "import numpy as np\n\n"):
        prompt_T = torch.tensor([tokenizer.bos, *tokenizer.encode([prompt])[0]])
        theirs = whole.generate(
            prompt_T[None],
            attention_mask=torch.ones_like(prompt_T[None]),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
        )[0, len(prompt_T) :].tolist()
        assert decode(model, prompt_T, 32, Sampling(0.0)).tokens == theirs, prompt


def test_a_missing_gguf_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        checkpoint_folder(str(tmp_path / "no.gguf"), str(tmp_path))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_model_names_the_trunk_and_its_kind() -> None:
    config: Config = parse(["preset=retrofit", "model=some/SmolLM2-135M.gguf", "rank=8"])
    assert config.model.trunk == "some/SmolLM2-135M.gguf" and config.is_pretrained and config.target == "common"
    assert config.run_name == "code-smollm2-135m-common-r8-n4-none-tied-eq14-s0"


@pytest.mark.parametrize(
    "words, message",
    [
        (["preset=retrofit"], "with a pretrained trunk (model=NAME), model"),
        (["model=x"], "data.tokenizer=bytes is not the tokenizer of the pretrained model x"),
        (["model=x", "data.tokenizer=bpe:999"], "type data.tokenizer=model"),
        (["model.family=pretrained", "data.tokenizer=model"], "needs the model: type model=NAME"),
        (["model.dtype=bfloat16"], "model.dtype=bfloat16 is for pretrained trunks"),
    ],
)
def test_settings_that_do_not_fit_a_pretrained_model(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(words)


# --- as a folder of its own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_model_comes_back_bit_for_bit(
    name: str, dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = with_heads(load_pretrained(str(folders[name]), dtype, CONTEXT), anchor="token")
    CpdlmForCausalLM.from_language_model(model, 1, 2).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).model
    theirs = dict(loaded.named_parameters())
    for key, parameter in model.named_parameters():
        assert parameter.dtype == theirs[key].dtype and torch.equal(parameter, theirs[key]), key
        # In a mapped file tensors stand where they happen to, and the rounding of a product depends on where that is.
        theirs[key].data = theirs[key].data.clone()
    prompt_T = torch.tensor([5, 6, 7])
    assert decode(loaded, prompt_T, 24, Sampling(0.0)).tokens == decode(model, prompt_T, 24, Sampling(0.0)).tokens
    tokens_BT = torch.randint(0, V, (1, 9))
    with torch.inference_mode():
        hidden_BTD = model.hidden(tokens_BT)
        assert torch.equal(loaded.target_log_probs(loaded.hidden(tokens_BT)), model.target_log_probs(hidden_BTD))
        assert torch.equal(
            loaded.draft_joint(hidden_BTD[:, -1], tokens_BT[:, -1]).log_factors_NRV,
            model.draft_joint(hidden_BTD[:, -1], tokens_BT[:, -1]).log_factors_NRV,
        )


def test_an_export_does_without_options_what_its_base_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling, penalties and ids are the base model's; a batch of its tokenizer can be continued."""
    base, shape = tmp_path / "base", LlamaConfig(**GROUPED)
    saved(shape, base)
    chosen = {"temperature": 0.7, "top_p": 1e-6, "do_sample": True, "repetition_penalty": 1.4, "max_new_tokens": 12}
    GenerationConfig(**chosen, bos_token_id=None, eos_token_id=[2, 7], pad_token_id=1).save_pretrained(base)
    words = WordLevel({"a" * (index + 1): index for index in range(V)}, unk_token="aaaa")
    PreTrainedTokenizerFast(
        tokenizer_object=TokenizerModel(words), eos_token="aaa", unk_token="aaaa", padding_side="right"
    ).save_pretrained(base)
    model = with_heads(load_pretrained(str(base), torch.float32, CONTEXT))
    tokenizer = HubTokenizer("model", base)
    config = resolve(
        {"model.trunk": str(base), "model.family": "pretrained", "data.tokenizer": "model", "data.context": CONTEXT}
        | {"decode.prompt_tokens": 4, "decode.new_tokens": 4}
    )
    monkeypatch.setattr(export, "load", lambda source: Loaded(model, tokenizer, [2, 7], config))
    export.export(tmp_path / "run", tmp_path / "mine")
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path / "mine", base)
    )
    told, said = (each.generation_config.to_diff_dict() for each in (ours, theirs))
    assert told == said and told["pad_token_id"] == 1 and told["repetition_penalty"] == 1.4
    tokens = AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert (tokens.padding_side, tokens.pad_token_id) == ("left", 2)
    rows = {"input_ids": torch.tensor([[2, 2, 5, 6], [8, 5, 9, 11]])}
    rows["attention_mask"] = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert ours.generate(**rows).tolist() == theirs.generate(**rows).tolist()
