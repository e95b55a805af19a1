"""A prepared model decodes as it would without: the same numbers, or those of its rounded weights, on every path."""

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    Ministral3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from cpdlm.config import ConfigError
from cpdlm.decoding import Options, Sampling, decode, decode_batch, prepare
from cpdlm.decoding import prepared as module
from cpdlm.decoding.products import LAYOUTS, ROUNDED, Int8, Joined, NoKernel, Product
from cpdlm.hf import CpdlmForCausalLM
from cpdlm.model.growing_cache import GrowingCache
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.pretrained import load_pretrained
from tests.test_forwards import real, texts

GREEDY = Sampling(0.0)
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": 61, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.3}
GROWING = {"rope_type": "default", "rope_theta": 10000.0} | {
    "llama_4_scaling_beta": 0.5,
    "original_max_position_embeddings": 16,
}
KINDS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "tied, biases, wide heads": LlamaConfig(
        **SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12}
    ),
    "scaled": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gpt2": GPT2Config(**GPT2, bos_token_id=None, eos_token_id=None),
    "phi, biased logits": PhiConfig(**SMALL),
    # The same parts as a Llama, but a layer without rotations; and queries that grow from some position on.
    "smollm3": SmolLM3Config(**SMALL | {"num_hidden_layers": 4}),
    "ministral3": Ministral3Config(**SMALL | {"head_dim": 8}, rope_parameters=GROWING),
}
FEW = {"llama", "tied, biases, wide heads", "scaled", "qwen2"}


def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(outputs)
    made = [torch.randn(size, generator=random) for size in ((outputs, inputs), (outputs,), (256, inputs))]
    made[2][3] = 0
    return made[0], made[1], made[2]


@pytest.mark.parametrize("widths", [(96, 64), (33, 51)])
@pytest.mark.parametrize("name", [*LAYOUTS, *ROUNDED])
def test_products_of_any_number_of_rows(name: str, widths: tuple[int, int]) -> None:
    weight_OI, bias_O, x_PI = linear(*widths)
    kind = (LAYOUTS | ROUNDED)[name]
    if name == "int4" and widths[1] % 32:
        with pytest.raises(NoKernel, match="multiples of 32 and 16, not 51 and 33"):
            kind(weight_OI, bias_O)
        return
    product = kind(weight_OI, bias_O)
    whole_PO = product(x_PI)
    right_PO = F.linear(x_PI, weight_OI, bias_O)
    error = float((whole_PO - right_PO).norm() / right_PO.norm())
    assert error < {"int8": 0.01, "int4": 0.15}.get(name, 1e-6)
    assert torch.equal(whole_PO[3], bias_O) or name in LAYOUTS
    for rows in (1, 2, 3, 4, 7, 16, 33):
        some_PO = product(x_PI[None, 5 : 5 + rows])[0]
        if name in ROUNDED:
            assert torch.equal(some_PO, whole_PO[5 : 5 + rows]), "a row's product depends on its neighbours"
        torch.testing.assert_close(some_PO, whole_PO[5 : 5 + rows], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("widths", [(96, 64), (33, 51), (20, 3)])  # torch's own kernels read beyond rows of 51 and 20
def test_8_bits_without_vnni_round_the_inputs_to_bfloat16(
    widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_OI, bias_O, x_PI = linear(*widths)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    right_PO = F.linear(x_PI, weight_OI, bias_O)
    for stored_OI in (weight_OI, weight_OI.t().contiguous().t()):  # as GPT-2 stores its maps
        assert (Int8(stored_OI, bias_O)(x_PI) - right_PO).norm() < 0.02 * right_PO.norm()


def pretrained(kind: str, folder: Path) -> tuple[LanguageModel, Any]:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(KINDS[kind]).eval()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    whole.save_pretrained(folder)
    return load_pretrained(str(folder), torch.float32, 96), whole


@pytest.mark.parametrize("kind", list(KINDS))
def test_greedy_texts_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model, whole = pretrained(kind, tmp_path)
    prepared = prepare(model, "packed")
    assert (prepared.weights, prepared.few_operations, prepared.sentences) == ("packed", kind in FEW, [])
    prompts = [torch.randint(61, (length,), generator=torch.Generator().manual_seed(length)) for length in (40, 3, 1)]
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    right = [
        whole.generate(each[None], attention_mask=torch.ones_like(each[None]), **options)[0, len(each) :].tolist()
        for each in prompts
    ]
    assert len(set(right[0])) > 2
    for use_cache in (True, False):
        ours = Options(use_cache=use_cache)
        assert [each.tokens for each in decode_batch(model, prompts, 24, GREEDY, options=ours)] == right
        assert decode(model, prompts[0], 24, GREEDY, options=ours).tokens == right[0]
    for width in (1, 5, 33, 64):  # windows, and texts longer than the rotations that were made
        tokens_BT = torch.arange(2 * width).remainder(61).view(2, width)
        with torch.no_grad():
            theirs = whole(tokens_BT).logits
            torch.testing.assert_close(model.target_logits(model.hidden(tokens_BT)), theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", ["packed", "int8", "int4"])
def test_drafted_and_autoregressive_texts_are_the_same(weights: str, family: str) -> None:
    plain = real("cpu", family, dtype=torch.float32)
    model = copy.deepcopy(plain)
    assert prepare(model, weights).weights == weights
    alone = [each.tokens for each in texts(model, GREEDY, "none", captures=False)]
    assert (alone == [each.tokens for each in texts(plain, GREEDY, "none", captures=False)]) == (weights == "packed")
    for draft in ("chain", "tree"):
        drafted = texts(model, GREEDY, draft, captures=False)
        assert [each.tokens for each in drafted] == alone and sum(drafted[0].accepted) > 0
    assert [each.tokens for each in texts(copy.deepcopy(model), GREEDY, "chain", captures=True)] == alone


@pytest.mark.parametrize(("vnni", "near"), [(False, 1e-5), (True, 0.02)])
def test_heads_draft_as_they_would_from_plain_weights(vnni: bool, near: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no VNNI instructions")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    plain = real("cpu", size=12, dtype=torch.float32, link="all")
    model = copy.deepcopy(plain)
    prepare(model, "packed")
    assert model.anchor is not None and isinstance(model.draft_product, type(model.anchor.into))
    assert isinstance(model.draft_product, Int8) == vnni
    hidden_BD, pending_B = torch.randn(3, model.trunk.width), torch.tensor([0, 7, 9])
    tokens_BN = torch.tensor([[0, 3, 11], [5, 5, 1], [2, 0, 8]])
    ours, right = (each.draft_joint(hidden_BD, pending_B).conditionals(tokens_BN) for each in (model, plain))
    assert (ours - right).abs().max() < near
    model.use_draft_vocabulary([4, 9])
    assert model.draft_joint(hidden_BD, pending_B).vocab_size == 2


class Missing(Joined):
    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        if weight_OI.shape[0] != self.only:
            raise NoKernel("this processor has none")
        super().__init__(weight_OI, bias_O)

    only = 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_a_kernel_the_weights_stay_plain_and_a_sentence_says_so(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROUNDED, "int4", Missing)
    monkeypatch.setattr(module, "Int8", Missing)
    plain = real("cpu", family, dtype=torch.float32)
    model = copy.deepcopy(plain)
    done = prepare(model, "int4")
    assert done.weights == model.weights == "plain"
    assert done.sentences == ["weights=int4 is not to be had here, the weights stay plain: this processor has none"]
    written = [[each.tokens for each in texts(one, GREEDY, "chain", captures=False)] for one in (plain, model)]
    assert written[0] == written[1]


def test_maps_without_a_kernel_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUNDED, "int4", type("Some", (Missing,), {"only": 64}))
    model = copy.deepcopy(real("cpu", "llama", dtype=torch.float32))
    assert prepare(model, "int4").sentences[0] == "4 of 9 linear maps stay plain: this processor has none"


def test_a_body_that_only_looks_like_a_llama_keeps_its_own_forward(tmp_path: Path) -> None:
    model, _ = pretrained("llama", tmp_path)
    attention = model.trunk.body.layers[0].self_attn
    attention.scaling = 0.1
    assert prepare(copy.deepcopy(model), "packed").few_operations, "a scale of its own is followed"
    norm = model.trunk.body.layers[0].input_layernorm
    norm.register_forward_hook(lambda *given: 2 * given[-1])
    done = prepare(model, "packed")
    assert not done.few_operations and done.weights == "packed"


def test_plain_weights_are_let_go() -> None:
    model = copy.deepcopy(real("cpu", "llama"))
    layer: Any = model.trunk.body.layers[1]
    weights = [weakref.ref(layer.mlp.up_proj.weight), weakref.ref(layer.self_attn.o_proj.weight)]
    del layer
    prepare(model, "packed")
    assert [each() for each in weights] == [None, None]
    assert model.embeddings_are_tied


def test_what_adapters_wrap_is_left_as_it_is() -> None:
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(real("cpu", "llama", dtype=torch.float32))
    names = ["q_proj", "down_proj"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False), model.trunk.body)
    tokens_BT = torch.arange(12).view(2, 6)
    before = model.hidden(tokens_BT)
    done = prepare(model, "packed")
    assert not done.few_operations
    kinds = {name: type(each) for name, each in model.trunk.body.named_modules() if "layers.0." in name}
    assert kinds["layers.0.self_attn.q_proj.base_layer"] is nn.Linear
    assert issubclass(kinds["layers.0.self_attn.k_proj"], Product)
    torch.testing.assert_close(model.hidden(tokens_BT), before, rtol=1e-4, atol=1e-4)


def test_a_prepared_model_is_neither_saved_nor_moved_nor_prepared_otherwise(tmp_path: Path) -> None:
    wrapped = CpdlmForCausalLM.from_language_model(copy.deepcopy(real("cpu", "llama")), 1, 2)
    ids = torch.randint(3, 61, (2, 7))
    before = wrapped.generate(ids, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    assert wrapped.prepare("packed").weights == "packed"
    assert torch.equal(wrapped.generate(ids, max_new_tokens=20, eos_token_id=None, pad_token_id=0), before)
    with pytest.raises(ValueError, match=r"prepared for decoding \(weights=packed\), .* load it again"):
        wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load it again, move it, and then prepare it"):
        wrapped.model.trunk.float()
    assert wrapped.prepare().weights == "packed"
    with pytest.raises(ConfigError, match=r"prepared already \(weights=packed\)"):
        wrapped.prepare("int8")
    with pytest.raises(ConfigError, match="weights=int3 .* give one of auto, plain"):
        wrapped.prepare("int3")


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_with_rounded_weights_the_chain_takes_the_place_of_branches(weights: str) -> None:
    wrapped = CpdlmForCausalLM.from_language_model(copy.deepcopy(real("cpu", "llama", dtype=torch.float32)), 1, 2)
    wrapped.config.draft = "branched"
    wrapped.prepare(weights)
    ids = torch.randint(3, 61, (1, 7), generator=torch.Generator().manual_seed(0))

    def written(**draft: str) -> Tensor:
        torch.manual_seed(0)
        return wrapped.generate(ids, do_sample=True, max_new_tokens=30, eos_token_id=None, pad_token_id=0, **draft)

    assert torch.equal(written(), written(draft="chain")) == (weights == "int8")
    assert torch.equal(written(), written(draft="branched")) == (weights == "packed")


def test_a_growing_cache_holds_what_a_dynamic_one_does() -> None:
    random = torch.Generator().manual_seed(0)
    ours, theirs = GrowingCache(), DynamicCache()
    for size in (3, 70, 1, 200, 2):
        new = [torch.randn(2, 3, size, 4, generator=random) for _ in range(2)]
        for one, other in zip(ours.update(*new, 0), theirs.update(*new, 0), strict=True):
            assert torch.equal(one, other)
        for cache in (ours, theirs):
            cache.crop(-(size // 2))
            cache.batch_select_indices(torch.tensor([1, 0]))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.layers[0].values, theirs.layers[0].values)
    with torch.inference_mode():
        ours.update(*new, 0)
    ours.update(*new, 0)  # outside, its tensors are not to be written to
    keys = torch.ones(2, 3, 1, 4, requires_grad=True)
    first = ours.update(keys, keys, 0)[0]
    second = ours.update(keys, keys, 0)[0]
    (first.square().sum() + second.sum()).backward()
    assert keys.grad is not None and float(keys.grad[0, 0, 0, 0]) == 2 + 2
