"""Every causal architecture of the installed transformers, tiny and random: does it decode as its own `generate` does?

python -m tests.causal_models            writes tests/causal_models.json again, after a look at what changed
"""

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers import __version__ as version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import set_verbosity_error

from cpdlm.config import ConfigError, resolve
from cpdlm.decoding import Options, Sampling, decode_batch
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.pretrained import load_pretrained
from tests.made_pretrained import continued, saved

LIST = Path(__file__).with_suffix(".json")
VOCABULARY, CONTEXT, NEW, LARGEST = 67, 32, 20, 8_000_000

# Sizes by the names that configs have for them; a config takes those that it knows.
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim"), 32
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "dff", "d_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "moe_topk", "top_k_experts"), 1),
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "head_dim": 8,
    "rotary_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 64,
    "state_size": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def outcome(kind: str) -> str:
    """ "equal", "differs: ...", "refused: ..." in the words of this project, or "not built: ..." with the reason."""
    torch.manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save(kind, Path(folder))
            try:
                base = load_pretrained(folder, torch.float32, CONTEXT, "M")
            except ConfigError as error:
                return f"refused: {_words(error)}"
            return _compared(Path(folder), base)
    except Exception as error:
        return f"not built: {type(error).__name__}: {_words(error)}"


def _save(kind: str, folder: Path) -> None:
    """A small model whose logits are far apart, so that its text wanders."""
    shape = _small(CONFIG_MAPPING[kind])
    with torch.device("meta"):
        count = sum(each.numel() for each in AutoModelForCausalLM.from_config(shape).parameters())
    assert count <= LARGEST, f"{count / 1e6:.0f} M parameters: sizes by other names than ours"
    saved(shape, folder)


def _small(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    known = kind()
    sizes = {name: value for name, value in SMALL.items() if _has(known, name)}
    if _has(known, "layer_types") and known.layer_types:
        sizes["layer_types"] = list(known.layer_types)[:2]
    inner = {
        name: _small(each).to_dict()
        for name, each in kind.sub_configs.items()
        if isinstance(each, type) and each is not PreTrainedConfig and hasattr(each, "model_type") and each.model_type
    }
    return kind(**sizes | inner)


def _has(shape: PreTrainedConfig, name: str) -> bool:
    """Whether a config has a value of that name, and takes another."""
    own = getattr(type(shape), name, None)
    if isinstance(own, property) and own.fset is None:
        return False
    try:
        return getattr(shape, name) is not None or name in ("head_dim", "num_experts_per_tok", "num_key_value_heads")
    except Exception:  # of no such name, and of one for each layer
        return False


@torch.inference_mode()
def _compared(folder: Path, base: LanguageModel) -> str:
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    settings = {"model.trunk": "x", "model.family": "pretrained", "data.tokenizer": "model", "rank": 2, "horizon": 4}
    settings |= {"data.context": CONTEXT, "decode.prompt_tokens": 4, "decode.new_tokens": 4}
    model = build_language_model(resolve(settings), base.vocab_size, base).eval()
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(7)) for length in (7, 4)]
    theirs = [continued(whole, each, NEW) for each in prompts]
    for draft in ("chain", "tree"):
        ours = decode_batch(model, prompts, NEW, Sampling(0.0), draft=draft, options=Options(nodes=5))
        if [each.tokens for each in ours] != theirs:
            return f"differs: {draft}"
    return "equal"


def _words(error: BaseException) -> str:
    """The first line of a message, without numbers and places, which change from run to run."""
    line = (str(error).strip().splitlines() or [""])[0]
    line = line.partition(";")[0].removeprefix("model=M ")
    return re.sub(r"/\S*/\S+", "FOLDER", re.sub(r"(?<![A-Za-z])\d+(\.\d+)?(e-?\d+)?", "#", line))[:160]


def outcomes(kinds: Iterable[str] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) -> dict[str, str]:
    set_verbosity_error()
    warnings.simplefilter("ignore")
    return {kind: outcome(kind) for kind in kinds}


if __name__ == "__main__":
    found = outcomes(sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if sys.argv[1:]:
        print(json.dumps(found, indent=1))
    else:
        LIST.write_text(json.dumps({"transformers": version, "models": found}, indent=1, sort_keys=True) + "\n")
