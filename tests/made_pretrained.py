"""Small random models of other people's architectures, as folders, and heads on them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as TokenizerModel
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from cpdlm.config import resolve
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.pretrained import load_pretrained

V, CONTEXT = 67, 48
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
SHORT = {"vocab_size": V, "num_hidden_layers": 2, "max_position_embeddings": 64} | ENDS
SMALL: dict[str, Any] = SHORT | {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
GEMMA = GROUPED | {"query_pre_attn_scalar": 8}
SHAPES: dict[str, PreTrainedConfig] = {
    "llama tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama untied": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ENDS),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**GROUPED),
    "opt, which makes its own masks": OPTConfig(
        **SHORT, hidden_size=32, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32, pad_token_id=0
    ),
    "gemma2, capped logits": Gemma2Config(
        **GEMMA, final_logit_softcapping=2.0, attn_logit_softcapping=20.0, sliding_window=64
    ),
    "granite, divided logits": GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=3.0),
    "phi, biased logits": PhiConfig(**SMALL),
    "cohere, scaled logits": CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.25),
}
HEADS = {"rank": 3, "horizon": 4, "data.context": CONTEXT, "decode.prompt_tokens": 4, "decode.new_tokens": 4}


def settings(trunk: str = "x", **more: Any) -> dict[str, Any]:
    """Of heads on a pretrained model; most tests need no folder's name."""
    return HEADS | {"model.trunk": trunk, "model.family": "pretrained", "data.tokenizer": "model"} | more


def saved(shape: PreTrainedConfig, folder: Path, **changes: Any) -> Path:
    """A small random model whose logits are far enough apart for its scale, cap and bias to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
        output = model.get_output_embeddings()
        if getattr(output, "bias", None) is not None:
            output.bias.normal_()
    model.save_pretrained(folder)
    if changes:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32, context: int = CONTEXT, *label: str) -> LanguageModel:
    return load_pretrained(str(folder), dtype, context, *label)


def with_heads(base: LanguageModel, **more: Any) -> LanguageModel:
    torch.manual_seed(1)
    return build_language_model(resolve(settings(**more)), V, base).eval()


def prompts(*lengths: int) -> list[Tensor]:
    return [torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]


def continued(whole: Any, prompt_T: Tensor, count: int) -> list[int]:
    """What `generate` of transformers writes behind a prompt, greedily."""
    chosen = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    ids_BT = prompt_T[None]
    written_BT = whole.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **chosen)
    return written_BT[0, len(prompt_T) :].tolist()


def word_tokenizer(words: str) -> TokenizerModel:
    return TokenizerModel(WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
