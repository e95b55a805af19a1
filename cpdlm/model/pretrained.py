"""Any causal language model of `transformers`, as the frozen trunk and target of heads.

Nothing here knows a model by name. Logits are softcap(scale * U h): scale and cap are what the library's configs call so,
and a probe of a few tokens decides whether that, the causality and the cache of a model are what decoding relies on.

Letters: B batch, T position, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cpdlm.config import ConfigError
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.trunk import Trunk, new_cache

PROBE = 12  # tokens
GIB = 2**30


def load_pretrained(
    source: str, dtype: torch.dtype, context: int, label: str = "", available_bytes: int | None = None
) -> LanguageModel:
    """The model of a Hugging Face folder or hub name as a plain next-token `LanguageModel`, frozen, in evaluation mode.

    dtype: of its weights and passes. context: the most tokens it will see. available_bytes: memory it may take (default:
    what is free). Raises ConfigError, naming the model and what to type, where it is missing, gated, incomplete, not a causal
    model with an output embedding, too large, or of a kind whose cache cannot be cropped or whose logits are not U h.
    """
    label = label or source
    shape = _shape(source, label)
    longest = getattr(shape, "max_position_embeddings", None) or context
    if longest < context:
        raise ConfigError(f"model={label} has a context of {longest} tokens; lower data.context={context}")
    with torch.device("meta"):
        try:
            empty = AutoModelForCausalLM.from_config(shape)
        except ValueError as error:
            raise ConfigError(
                f"model={label} is a {shape.model_type} model, not a causal language model; give one that is"
            ) from error
    _check_memory(empty, dtype, label, _free_bytes() if available_bytes is None else available_bytes)
    if empty.get_output_embeddings() is None:
        raise ConfigError(
            f"model={label} ({type(empty).__name__}) has no output embedding, so no law of the next token"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"model={label} cannot be loaded: {_first_line(error)}; give a folder with safetensors weights"
        ) from error
    whole, found = loaded
    if found["missing_keys"]:
        raise ConfigError(
            f"model={label} is not whole: its weights lack {sorted(found['missing_keys'])[:3]}; download it again"
        )
    whole = whole.eval().requires_grad_(False)
    return _wrapped(whole, context, label)


def _wrapped(whole: PreTrainedModel, context: int, label: str) -> LanguageModel:
    text = whole.config.get_text_config()
    body = getattr(whole, whole.base_model_prefix)
    unembedding = whole.get_output_embeddings()
    tied = unembedding.weight is body.get_input_embeddings().weight
    model = LanguageModel(
        Trunk(body), unembedding.weight.shape[0], rank=1, horizon=1, first_is_tied=True, anchored=False, common_target=False,
        context=context, tie_embeddings=tied, logit_scale=_scale(text), logit_softcap=getattr(text, "final_logit_softcapping", None) or 0.0,
    )  # fmt: skip
    if not tied:
        model.unembedding.weight = unembedding.weight
    model = model.eval().requires_grad_(False)
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    slides = "sliding_attention" in kinds or (
        window and getattr(text, "use_sliding_window", True) and "layer_types" not in text.to_dict()
    )
    if kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"model={label} has {', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))} layers, whose cache cannot be cropped"
        )
    if slides and window and window < context:
        raise ConfigError(
            f"model={label} attends to the last {window} tokens in some layers, and data.context={context} is longer: such a cache "
            f"cannot be cropped; lower data.context to {window}"
        )
    _probe(model, whole, label)
    return model


def _scale(text: Any) -> float:
    """What the hidden state's logits are multiplied by, under the names that the library's configs have for it."""
    if getattr(text, "logit_scale", None):
        return float(text.logit_scale)
    return 1 / float(getattr(text, "logits_scaling", None) or 1.0)


@torch.inference_mode()
def _probe(model: LanguageModel, whole: PreTrainedModel, label: str) -> None:
    """Our logits are the model's; an earlier token does not see a later one; a cropped cache goes on as if never longer."""
    tokens_BT = torch.randint(0, model.vocab_size, (1, PROBE), generator=torch.Generator().manual_seed(0))
    theirs_BTV: Tensor = whole(tokens_BT).logits.float()
    ours_BTV = _logits(model, model.hidden(tokens_BT))
    near = 1e-4 if model.trunk.embedding.dtype == torch.float32 else 2e-2
    near *= max(1.0, float(theirs_BTV.abs().max()))
    if not _close(ours_BTV, theirs_BTV, near):
        raise ConfigError(
            f"model={label} ({type(whole).__name__}): its logits are not softcap(scale * U h), they differ by "
            f"{float((ours_BTV - theirs_BTV).abs().max()):.2g} (a bias in the output layer?); it cannot be the target here"
        )
    if not _close(_logits(model, model.hidden(tokens_BT[:, : PROBE // 2])), theirs_BTV[:, : PROBE // 2], near):
        raise ConfigError(
            f"model={label} ({type(whole).__name__}) is not causal: earlier tokens see later ones (an encoder?)"
        )
    cache = new_cache()
    try:
        model.hidden(tokens_BT[:, :8], cache=cache)
        model.hidden(tokens_BT[:, [3, 1, 2]], cache=cache)
        cache.crop(-3)
        rest_BTV = _logits(model, model.hidden(tokens_BT[:, 8:], cache=cache))
        crops = cache.get_seq_length() == PROBE and _close(rest_BTV, theirs_BTV[:, 8:], near)
    except Exception:  # whatever a cache of another kind makes of it
        crops = False
    if not crops:
        raise ConfigError(
            f"model={label} ({type(whole).__name__}) keeps a state that cannot be cropped to an earlier token, as rejected drafts "
            "need; give a model with an ordinary key-value cache"
        )


def _logits(model: LanguageModel, hidden_BTD: Tensor) -> Tensor:
    return model.target_logits(hidden_BTD, model.unembedding.weight).float()


def _close(ours: Tensor, theirs: Tensor, near: float) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= near)


def _shape(source: str, label: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model={label} cannot be found, or is gated: {_first_line(error)}. Give a Hugging Face folder, a GGUF file, smollm2, or a "
            "hub name that this machine can reach (a gated one after `hf auth login`)"
        ) from error


def _check_memory(empty: nn.Module, dtype: torch.dtype, label: str, available: int) -> None:
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    need = parameters * dtype.itemsize
    if need > 0.9 * available:
        halved = "" if dtype.itemsize == 2 else f" model.dtype=bfloat16 takes {parameters * 2 / GIB:.1f} GiB."
        raise ConfigError(
            f"model={label} has {parameters / 1e9:.2f}B parameters, {need / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}, and "
            f"{available / GIB:.1f} GiB are free.{halved} Up to {0.9 * available / dtype.itemsize / 1e9:.2f}B parameters fit"
        )


def _free_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    import psutil

    return int(psutil.virtual_memory().available)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
