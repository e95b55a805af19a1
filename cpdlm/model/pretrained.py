"""Any causal language model of `transformers`, as the frozen trunk and target of heads.

Nothing here knows a model by name. Logits are softcap(scale * (U h + b)): scale and cap are what the library's configs
call so, and a probe of a few tokens decides whether that, the causality, the cache and the masks of a model are what
decoding relies on.

Letters: B batch, T position, L slots of a cache, S tokens behind it, V vocabulary, D width.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers import __version__ as version
from transformers.utils import cached_file

from cpdlm.config import ConfigError
from cpdlm.config.words import first_line
from cpdlm.data.pretrained_files import brings_code, free_memory
from cpdlm.model.heads import HeadsConfig
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.output import Output
from cpdlm.model.trunk import Trunk, new_cache

PROBE = 12  # tokens, or as many as an attention window holds beside DEAD
FEWEST = 4
DEAD = 2  # slots of a cache that do not count
GIB = 2**30
MANY_LAYERS = 1000
LAYER_BYTES = 50_000  # of the Python objects of a layer without weights, at least


def load_pretrained(
    source: str,
    dtype: torch.dtype,
    context: int,
    label: str = "",
    available_bytes: int | None = None,
    probed: bool = False,
) -> LanguageModel:
    """The model of a Hugging Face folder or hub name as a next-token `LanguageModel`, frozen, in evaluation mode.

    dtype: of its weights and forwards. context: tokens of a training row; the model's own `context` is what its config
    allows, and this where it says nothing. available_bytes: memory it may take (default: what is free). probed:
    whether heads were trained on these very weights, which then need no probe.

    Raises ConfigError, naming the model and what to type, where it is missing, gated, incomplete, too large, quantised
    in a way that cannot be read here, or not a causal model with an output embedding; and for a kind whose cache cannot
    be cropped or whose logits are not U h + b.
    """
    label = label or source
    available = free_bytes(label) if available_bytes is None else available_bytes
    check_layers(source, dtype.itemsize, label, available)
    shape = _shape(source, label)
    if shape.model_type == "cpdlm":
        raise ConfigError(f"model={label} has heads already; give the model that they were trained on")
    longest = _longest(shape) or context
    _check_shape(shape, context, longest, label)
    with torch.device("meta"):
        try:
            empty = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
        except ValueError as error:
            raise ConfigError(
                f"model={label} is a {shape.model_type} model, not a causal language model; give one that is"
            ) from error
    _check_memory(empty, dtype, label, available)
    if empty.get_output_embeddings() is None:
        raise ConfigError(
            f"model={label} ({type(empty).__name__}) has no output embedding, so no next-token distribution; "
            "give a causal language model"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        advice = _quantised(shape) or "give a folder with whole safetensors weights"
        raise ConfigError(f"model={label} cannot be loaded: {first_line(error).rstrip('.')}; {advice}") from error
    whole, found = loaded
    if found["missing_keys"]:
        advice = _quantised(shape) or "download it again"
        raise ConfigError(f"model={label} is not whole: its weights lack {sorted(found['missing_keys'])[:3]}; {advice}")
    model = _wrapped(whole.eval().requires_grad_(False), longest, label)
    if not probed:
        _probe(model, whole, label)
    return model


def _wrapped(whole: PreTrainedModel, context: int, label: str) -> LanguageModel:
    text = whole.config.get_text_config()
    for each in (whole.config, text):
        each.return_dict = True  # some checkpoints say otherwise; nothing here reads tuples
    unembedding = whole.get_output_embeddings()
    try:
        body = getattr(whole, whole.base_model_prefix)
        tied = unembedding.weight is body.get_input_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise ConfigError(
            f"model={label} ({type(whole).__name__}) has no body that can be run without its output layer "
            f"({first_line(error)}); it cannot be the trunk here"
        ) from error
    model = LanguageModel(
        Trunk(body),
        unembedding.weight.shape[0],
        HeadsConfig(),
        context=context,
        tie_embeddings=tied,
        output=Output(_scale(text), _number(text, "final_logit_softcapping") or 0.0),
    )
    if not tied:
        model.unembedding.weight = unembedding.weight
    model.unembedding.bias = unembedding.bias
    return model.eval().requires_grad_(False)


def _scale(text: Any) -> float:
    """What the hidden state's logits are multiplied by, under the names that the library's configs have for it."""
    return _number(text, "logit_scale") or 1 / (_number(text, "logits_scaling") or 1.0)


def _number(text: Any, name: str) -> float | None:
    value = getattr(text, name, None)
    return float(value) if isinstance(value, int | float) else None


def multiplies_bfloat16() -> bool:
    """Whether this machine has instructions for it: a GPU, or a processor that oneDNN has kernels for.

    Elsewhere it is emulated: a forward over four tokens takes four times as long as over one, and float32 is faster.
    oneDNN calls every x86 processor with AVX-512 supported, emulated or not.
    """
    if torch.cuda.is_available():
        return True
    known = torch.cpu.get_capabilities()
    emulated = known.get("architecture") == "x86_64" and not (known.get("avx512_bf16") or known.get("amx_bf16"))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not emulated


@torch.inference_mode()
def _probe(model: LanguageModel, whole: PreTrainedModel, label: str) -> None:
    """Raise ConfigError unless the model is what decoding relies on.

    An earlier token does not see a later one. Our logits are the model's. A cropped cache goes on as if it had never
    been longer. Masks and positions alone say where a token stands (a batch's rows keep dead slots). Tokens of another
    document in the row are not seen.
    """
    kind = f"model={label} ({type(whole).__name__})"
    size = PROBE if model.attention_window is None else min(PROBE, model.attention_window - DEAD)
    if size < FEWEST:
        raise ConfigError(
            f"{kind} attends to the last {model.attention_window} tokens in some layers, and what decoding relies on "
            f"is tried on {FEWEST + DEAD}; give a model with a longer window"
        )
    tokens_BT = torch.randint(0, model.vocab_size, (1, size), generator=torch.Generator().manual_seed(0))
    half = size // 2
    try:
        theirs_BTV: Tensor = whole(tokens_BT, use_cache=False).logits.float()
        prefix_BTV: Tensor = whole(tokens_BT[:, :half], use_cache=False).logits.float()
        ours_BTV = _logits(model, model.hidden(tokens_BT))
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{kind} does not run on a row of tokens ({first_line(error)}); give another model"
        ) from error
    # Of the largest logit: bfloat16 through 30 layers leaves 2e-2 on processors that emulate it; tokens that should not
    # be seen change logits by their own size.
    near = 1e-4 if model.trunk.embedding.dtype == torch.float32 else 5e-2
    near *= max(1.0, float(theirs_BTV.abs().max()))
    if not _close(prefix_BTV, theirs_BTV[:, :half], near):
        raise ConfigError(f"{kind} is not causal: earlier tokens see later ones (an encoder?); give one that is")
    if not _close(ours_BTV, theirs_BTV, near):
        apart = "have another shape"
        if ours_BTV.shape == theirs_BTV.shape:
            apart = f"differ by {float((ours_BTV - theirs_BTV).abs().max()):.2g}"
        raise ConfigError(
            f"{kind}: its logits are not softcap(scale * (U h + b)), they {apart}; it cannot be the target here"
        )
    if not _caches(model.trunk, tokens_BT):
        raise ConfigError(f"{kind} has no key-value cache, which drafts are verified with; give a model with one")
    trials = {
        "keeps a state that cannot be cropped to an earlier token, as rejected drafts need; "
        "give a model with an ordinary key-value cache": _cropped,
        "does not take masks and positions as they are, which rows of different lengths need; "
        "give another model": _masked,
        "lets the documents of a training row see each other; give another model": _packed,
    }
    for fault, trial in trials.items():
        try:
            holds = _close(_logits(model, trial(model.trunk, tokens_BT, half)), theirs_BTV[:, half:], near)
        except Exception:  # whatever a model of another kind makes of it
            holds = False
        if not holds:
            raise ConfigError(f"{kind} {fault}")


def _caches(trunk: Trunk, tokens_BT: Tensor) -> bool:
    """False for a model that takes a cache and keeps nothing in it; of one that fails, the trials say why."""
    cache = new_cache()
    try:
        trunk(tokens_BT, cache=cache)
    except Exception:
        return True
    return len(cache.layers) > 0


def _cropped(trunk: Trunk, tokens_BT: Tensor, half: int) -> Tensor:
    """Hidden states from `half` on, behind a cache that held three other tokens for a while."""
    cache = new_cache()
    trunk(tokens_BT[:, :half], cache=cache)
    trunk(tokens_BT[:, [3, 1, 2]], cache=cache)
    cache.crop(-3)
    hidden_BSD: Tensor = trunk(tokens_BT[:, half:], cache=cache)
    assert cache.get_seq_length() == tokens_BT.shape[1]
    return hidden_BSD


def _masked(trunk: Trunk, tokens_BT: Tensor, half: int) -> Tensor:
    """The same behind a cache that holds two dead slots, in a batch's terms."""
    cache, indices_BT = new_cache(), torch.arange(tokens_BT.shape[1]).unsqueeze(0)
    live_BL = torch.ones(1, tokens_BT.shape[1] + DEAD, dtype=torch.bool)
    trunk(tokens_BT[:, :half], indices_BT[:, :half], cache, live_BL[:, :half])
    trunk(tokens_BT[:, [3, 1]], indices_BT[:, half : half + DEAD], cache, live_BL[:, : half + DEAD])
    live_BL[:, half : half + DEAD] = False
    hidden_BSD: Tensor = trunk(tokens_BT[:, half:], indices_BT[:, half:], cache, live_BL)
    return hidden_BSD


def _packed(trunk: Trunk, tokens_BT: Tensor, half: int) -> Tensor:
    """The same in a row that begins with another document of three tokens."""
    indices_BT = torch.cat([torch.arange(3), torch.arange(tokens_BT.shape[1])]).unsqueeze(0)
    hidden_BTD: Tensor = trunk(torch.cat([tokens_BT[:, [3, 1, 2]], tokens_BT], dim=1), indices_BT)
    return hidden_BTD[:, 3 + half :]


def _logits(model: LanguageModel, hidden_BTD: Tensor) -> Tensor:
    return model.target_logits(hidden_BTD).float()


def _close(ours: Tensor, theirs: Tensor, near: float) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= near)


def _shape(source: str, label: str) -> Any:
    folder = Path(source)
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"model={label} is an adapter of another model, not a model; merge the two, save them, and give that "
            "folder: AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload()"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        ours = (folder / "config.yaml").is_file()
        advice = f"it is a run of this program: type model.trunk={label}" if ours else "give a Hugging Face folder"
        raise ConfigError(f"model={label} is a folder without a config.json; {advice}")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if brings_code(error):
            raise ConfigError(
                f"model={label} brings code of its own (auto_map in its config.json), which is not executed here; "
                "give a model of an architecture that transformers has"
            ) from error
        if (kind := _kind(source)) is not None:
            raise ConfigError(
                f"model={label}: {f'its model_type is {kind}' if kind else 'its config.json has no model_type'}, which "
                f"transformers {version} does not know; install a release that does, or give another model"
            ) from error
        raise ConfigError(
            f"model={label} cannot be found, or is gated: {first_line(error).rstrip('.')}. "
            "Give a Hugging Face folder, a GGUF file, smollm2, or a hub name that this machine can reach "
            "(a gated one after `hf auth login`)"
        ) from error


def longest_text(source: str, label: str = "") -> int | None:
    """Tokens of the longest text of a model by its config, which is `load_pretrained`'s `context`; None where that says
    nothing. Raises ConfigError where there is no such model."""
    return _longest(_shape(source, label or source))


def width(source: str, label: str = "") -> int:
    """Of a model's hidden states by its config, or what is usual where that says nothing. Raises as `longest_text`."""
    text = _shape(source, label or source).get_text_config(decoder=True)
    return int(getattr(text, "hidden_size", None) or 1024)


def _kind(source: str) -> str | None:
    """model_type of a config.json that is here, "" where it names none; None where there is no config.json to read."""
    content = _written(source, local_files_only=True)
    return None if content is None else str(content.get("model_type", ""))


def _written(source: str, **how: Any) -> dict[str, Any] | None:
    """The config.json of a folder or hub name as it is written; None where there is none to read."""
    try:
        content = json.loads(Path(str(cached_file(source, "config.json", **how))).read_bytes())
    except (OSError, ValueError, TypeError):
        return None
    return content if isinstance(content, dict) else None


def _longest(shape: Any) -> int | None:
    """Tokens of the longest text that the config allows; None where it says nothing.

    Where longer texts have other rotary frequencies (longrope), those of the shorter ones, which keys in a cache have.
    """
    text = shape.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None) or 0
    rope = getattr(text, "rope_parameters", None) or {}
    for each in (rope, *rope.values()):  # one for all layers, or one for each kind of layer
        if isinstance(each, dict) and each.get("rope_type") == "longrope":
            longest = min(longest, each["original_max_position_embeddings"])
    return longest if longest > 0 else None


def _quantised(shape: Any) -> str:
    """What to give in place of a checkpoint whose config says that its weights are packed; empty for others."""
    texts = (shape, shape.get_text_config(decoder=True))
    packed = next((found for each in texts if (found := getattr(each, "quantization_config", None))), None)
    if packed is None:
        return ""
    bits = next((bits for bits in (4, 8) if packed.get(f"load_in_{bits}bit")), packed.get("bits"))
    how = packed.get("quant_method", "method unnamed") + (f", {bits} bits" if bits else "")
    return f"it is quantised ({how}): give the checkpoint that it was made from, unquantised, or a GGUF file of it"


def _check_shape(shape: Any, context: int, longest: int, label: str) -> None:
    """Raise ConfigError for what the config alone rules out, before any weight is read."""
    if getattr(shape, "is_encoder_decoder", False):
        raise ConfigError(
            f"model={label} is a {shape.model_type} model, not a causal language model: it has an encoder; "
            "give one without"
        )
    if longest < context:
        raise ConfigError(f"model={label} has a context of {longest} tokens; lower data.context={context}")
    try:
        layers = DynamicCache(config=shape).layers
    except Exception:  # a config without layers as the library counts them: the probe decides
        return
    for layer in layers:
        window = getattr(layer, "sliding_window", None)
        if window and window < context:
            raise ConfigError(
                f"model={label} attends to the last {window} tokens in some layers, and data.context={context} is "
                f"longer: the masks of training rows would show them more; lower data.context to {window}"
            )
        if not window and not getattr(layer, "is_croppable", True):
            raise ConfigError(
                f"model={label} keeps a state in some layers ({type(layer).__name__}) that cannot be cropped to an "
                "earlier token, as rejected drafts need; give a model with an ordinary key-value cache"
            )


def check_layers(source: str, itemsize: int, label: str, available: int) -> None:
    """ConfigError where the layers alone take more than is free, before they are built one by one.

    A layer counts as width^2 weights of `itemsize` bytes, which is fewer than any has, and its modules as LAYER_BYTES.
    As many as MANY_LAYERS are built, and counted exactly.
    """
    written = _written(source) or {}  # the library's own classes make lists of all layers; `_shape` says what is wrong
    inner = written.get("text_config")
    text = written | inner if isinstance(inner, dict) else written
    layers, width = (text.get(name) for name in ("num_hidden_layers", "hidden_size"))
    layers, width = (value if isinstance(value, int) else 0 for value in (layers, width))
    need = layers * (width * width * itemsize + LAYER_BYTES)
    if layers > MANY_LAYERS and need > available:
        raise ConfigError(
            f"model={label} has {layers:,} layers by its config.json, at least {need / GIB:,.0f} GiB, and "
            f"{available / GIB:.1f} GiB are free; look at num_hidden_layers, or give a smaller model"
        )


def _check_memory(empty: nn.Module, dtype: torch.dtype, label: str, available: int) -> None:
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    need = parameters * dtype.itemsize
    if need > 0.9 * available:
        halved = "" if dtype.itemsize == 2 else f" model.dtype=bfloat16 takes {parameters * 2 / GIB:.1f} GiB."
        raise ConfigError(
            f"model={label} has {parameters / 1e9:.2f}B parameters, {need / GIB:.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, and {available / GIB:.1f} GiB are free.{halved} "
            f"Up to {0.9 * available / dtype.itemsize / 1e9:.2f}B parameters fit"
        )


def free_bytes(label: str) -> int:
    """Of the machine and of its accelerator, if any: weights are read into the one, then moved to the other."""
    free = free_memory(label)
    return min(free, torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else free
