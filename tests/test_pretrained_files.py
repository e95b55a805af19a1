"""Where pretrained models come from, what of them will not do, and that each is refused in words that help."""

import hashlib
import io
import json
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
from made_pretrained import CONTEXT, ENDS, GEMMA, GROUPED, SHAPES, SMALL, V, loaded, saved, word_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    Gemma2Config,
    GenerationConfig,
    GitConfig,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cpdlm.config import ConfigError, parse
from cpdlm.data.pretrained_files import ORIGIN, checkpoint_folder, content_hash, generation_of
from cpdlm.data.tokenizer import HubTokenizer, tokenizer_hash
from cpdlm.model import pretrained as model_files
from cpdlm.model.pretrained import load_pretrained
from cpdlm.training.plan import make_plan

TINY: dict[str, Any] = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4}
HALF = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SEEING = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
REFUSED = {
    "an encoder": (BertConfig(**SMALL), "is not causal: earlier tokens see later ones"),
    "state space": (
        MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
        "cannot be cropped",
    ),
    "no cache": (OpenAIGPTConfig(**TINY), "has no key-value cache"),
    "masks of its own": (
        GitConfig(**SMALL, vision_config=SEEING),
        "does not take masks and positions as they are",
    ),
    "half an encoder-decoder": (
        BartConfig(
            vocab_size=V, d_model=32, max_position_embeddings=64, encoder_ffn_dim=64, decoder_ffn_dim=64, **HALF
        ),
        "has no body that can be run without its output layer",
    ),
    "a window in all layers": (MistralConfig(**GROUPED, sliding_window=16), "lower data.context to 16"),
    "a window": (Gemma2Config(**GEMMA, sliding_window=16), "lower data.context to 16"),
    "too short": (GPT2Config(**TINY, n_positions=32), "has a context of 32 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_decoding_cannot_rely_on_is_refused_by_name(name: str, tmp_path: Path) -> None:
    shape, message = REFUSED[name]
    folder = saved(shape, tmp_path)
    with pytest.raises(ConfigError, match=rf"model=my-model.*{message}"):
        load_pretrained(str(folder), torch.float32, CONTEXT, "my-model")


def test_encoders_with_or_without_a_decoder_are_no_causal_models(tmp_path: Path) -> None:
    for shape in (T5Config(vocab_size=V), BartConfig(is_encoder_decoder=True), DistilBertConfig(vocab_size=V)):
        shape.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=f"is a {shape.model_type} model, not a causal language model"):
            loaded(tmp_path)


def test_a_model_larger_than_memory_is_refused_before_it_is_built(
    pretrained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = json.loads((pretrained["llama tied"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape))  # no weights at all
    with pytest.raises(ConfigError, match=r"0.00B parameters.*float32.*model.dtype=bfloat16 takes.*parameters fit"):
        load_pretrained(str(tmp_path), torch.float32, CONTEXT, available_bytes=1000)
    shape.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 10**9}))
    layers = r"has 1,000,000,000 layers by its config.json, at least [\d,]+ GiB, and .* free"
    with pytest.raises(ConfigError, match=layers):
        loaded(tmp_path)
    with pytest.raises(ConfigError, match=layers):
        make_plan(parse([f"model={tmp_path}", "data.tokenizer=model"]))
    # As a hub name finds it among the files that the hub's client keeps.
    monkeypatch.setattr(model_files, "cached_file", lambda name, file, **how: tmp_path / file)
    with pytest.raises(ConfigError, match=layers):
        load_pretrained("owner/name", torch.float32, CONTEXT)


def test_a_quantised_checkpoint_that_cannot_be_read_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_gptq.is_optimum_available", lambda *_: False)
    packed = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    folder = saved(SHAPES["llama tied"], tmp_path, quantization_config=packed)
    with pytest.raises(ConfigError, match=r"model=mine cannot be loaded: .*it is quantised \(gptq, 4 bits\): give the"):
        load_pretrained(str(folder), torch.float32, CONTEXT, "mine")


@pytest.mark.parametrize("packed", [{}, {"quantization_config": {"quant_method": "strange"}}], ids=["lost", "packed"])
def test_weights_that_are_not_whole_are_refused(packed: dict[str, Any], tmp_path: Path) -> None:
    """And of a quantisation that is not known, they are no torn download."""
    folder = saved(SHAPES["llama untied"], tmp_path, **packed)
    weights = load_file(folder / "model.safetensors")
    gone = weights.pop("lm_head.weight")
    more = {"lm_head.qweight": gone.to(torch.int8)} if packed else {}
    save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})
    said = r"; it is quantised \(strange\): give the" if packed else ""
    with pytest.raises(ConfigError, match=rf"weights lack \['lm_head.weight'\]{said}"):
        loaded(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be loaded: "):
        loaded(folder)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "is a folder without a config.json; give a Hugging Face folder"),
        ({"config.yaml": ""}, "it is a run of this program: type model.trunk="),
        ({"config.json": '{"model_type": "foo9"}'}, "its model_type is foo9, which transformers .* does not know"),
        ({"config.json": "{}"}, "has no model_type, which transformers .* does not know"),
    ],
)
def test_a_folder_that_is_no_model_is_told_apart(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path)


@pytest.mark.parametrize("reachable", [True, False])
def test_a_name_is_asked_for_once(reachable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself retries for half a minute."""
    asked = []

    def answer(self: HfApi, name: str, timeout: float) -> None:
        asked.append(name)
        raise HFValidationError("no such name") if reachable else ConnectionError("name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", answer)
    said = "no such model on the hub" if reachable else r"the hub cannot be reached \(name or service not known\)"
    with pytest.raises(ConfigError, match=f"model=some-{reachable}: there is no such folder here, and {said}"):
        checkpoint_folder(f"some-{reachable}", str(tmp_path))
    with pytest.raises(ConfigError, match=f"data.tokenizer=hf:x: there is no such folder here, and {said}"):
        HubTokenizer("hf:x", f"other-{reachable}")
    assert asked == [f"some-{reachable}", f"other-{reachable}"]


def test_a_name_that_is_nowhere_or_gated_says_what_the_hub_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError("You are trying to access a gated repo.\nMake sure")  # what the library makes of the hub's errors

    monkeypatch.setattr("cpdlm.model.pretrained.AutoConfig.from_pretrained", refuse)
    with pytest.raises(
        ConfigError, match="cannot be found, or is gated: You are .* gated repo. Give a .*hf auth login"
    ):
        loaded(Path("owner/none"))


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal, and take what a pipe says for the answer."""
    monkeypatch.setattr("sys.stdin", io.StringIO("yes, this is a prompt\n"))
    theirs = {"AutoConfig": "code.Theirs", "AutoTokenizer": "code.Words"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": theirs}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Words", None]}}))
    (tmp_path / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'touched')!r})\n")
    for load in (
        lambda: loaded(tmp_path),
        lambda: HubTokenizer("hf:theirs", tmp_path),
    ):
        with pytest.raises(ConfigError, match=r"(model|data.tokenizer)=.* brings code of its own"):
            load()
    assert sys.stdin.read().startswith("yes") and not (tmp_path / "touched").exists()


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_itself_and_a_hub_name_is_left_alone(tmp_path: Path) -> None:
    assert checkpoint_folder(str(tmp_path), str(tmp_path / "cache")) == str(tmp_path)
    assert checkpoint_folder("owner/name", str(tmp_path / "cache")) == "owner/name"
    with pytest.raises(ConfigError, match="there is no such file"):
        checkpoint_folder(str(tmp_path / "no.gguf"), str(tmp_path))


TOKENS = [*["<|endoftext|>", "<s>", "</s>", *bytes_to_unicode().values()][: V - 1], '!"']


@pytest.fixture(scope="module")
def qwen2_gguf(pretrained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 as llama.cpp writes it, unquantised; its tokenizer knows single bytes."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(pretrained["qwen2"])
    path = tmp_path_factory.mktemp("gguf") / "my model.gguf"
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
    writer.add_bos_token_id(ENDS["bos_token_id"])
    writer.add_eos_token_id(ENDS["eos_token_id"])
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_becomes_an_ordinary_folder_once(pretrained: dict[str, Path], qwen2_gguf: Path, tmp_path: Path) -> None:
    folder = Path(checkpoint_folder(str(qwen2_gguf), str(tmp_path)))
    origin = json.loads((folder / ORIGIN).read_text())
    assert origin["sha256"] == hashlib.sha256(qwen2_gguf.read_bytes()).hexdigest()
    assert folder.parent == tmp_path / "models"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, tokens_BT = loaded(folder), torch.randint(0, V, (1, 9))
    with torch.inference_mode():
        ours = model.target_logits(model.hidden(tokens_BT), model.unembedding.weight)
        theirs = AutoModelForCausalLM.from_pretrained(pretrained["qwen2"])(tokens_BT).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    tokenizer = HubTokenizer("model", folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 2, V)
    assert tokenizer.decode(tokenizer.encode(["#%*"])[0]) == "#%*"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    checkpoint_folder.cache_clear()
    assert checkpoint_folder(str(qwen2_gguf), str(tmp_path)) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 272, 40) + b"\x04\x00"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", HEADER, 0.02, 0.3, 0.6, 0.999])
def test_a_gguf_that_is_cut_off_is_refused(content: bytes | float, qwen2_gguf: Path, tmp_path: Path) -> None:
    """A number: that share of a whole one."""
    whole = qwen2_gguf.read_bytes()
    written = whole[: int(content * len(whole))] if isinstance(content, float) else content
    (tmp_path / "cut.gguf").write_bytes(written)
    with pytest.raises(ConfigError, match=r"cut.gguf cannot be read .*no GGUF file, or cut off \(download it again\)"):
        checkpoint_folder(str(tmp_path / "cut.gguf"), str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("models/*"))


def test_a_gguf_larger_than_memory_or_without_its_packages_says_so(
    qwen2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patch, said in (
        (("psutil.virtual_memory", lambda: SimpleNamespace(available=1000)), "has 0.00B parameters; dequantising"),
        ((sys.modules, "gguf", None), "type pip install gguf accelerate"),
    ):
        with monkeypatch.context() as patched, pytest.raises(ConfigError, match=said):
            (patched.setitem if len(patch) == 3 else patched.setattr)(*patch)  # type: ignore[operator]
            checkpoint_folder(str(qwen2_gguf), str(tmp_path / "cache"))


def test_hashes_follow_content(pretrained: dict[str, Path], tmp_path: Path) -> None:
    one, copy = pretrained["gpt2"], tmp_path / "copy"
    shutil.copytree(one, copy)
    assert content_hash(str(one)) == content_hash(str(copy)) != content_hash(str(pretrained["qwen2"]))
    assert content_hash("owner/name") != content_hash("owner/other")

    def digest(words: str, begun: str = "", **changes: str) -> str:
        model = word_tokenizer(words)
        if begun:
            special = [(begun, model.token_to_id(begun))]
            model.post_processor = TemplateProcessing(single=f"{begun} $A", special_tokens=special)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="a")
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        tokenizer.save_pretrained(folder)
        return tokenizer_hash(str(folder))

    # What only changes prompts changes them for the right model.
    template = {"chat_template": "{{ messages[0]['content'] }}"}
    assert digest("ab") == digest("ab")
    assert len({digest("ab"), digest("ac"), digest("ab", begun="b"), digest("ab", **template)}) == 4


def test_a_text_ends_where_generate_stops(tmp_path: Path) -> None:
    """By the generation configuration, or without one by the model's own."""
    folder = saved(SHAPES["llama tied"], tmp_path, eos_token_id=[2, 7])

    def ends() -> Any:
        theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        return generation_of(str(folder)).eos_token_id, theirs

    assert ends() == (2, 2), "config.json is not asked"
    GenerationConfig(eos_token_id=[5, 9]).save_pretrained(folder)
    assert ends() == ([5, 9], [5, 9])
    (folder / "generation_config.json").unlink()
    assert ends() == ([2, 7], [2, 7])
