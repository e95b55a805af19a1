"""A target made ready to decode on this machine: how its weights are held, and with how few operations it runs.

    plain     the modules of transformers, as they are
    packed    the same numbers, laid out as this processor multiplies fastest: the same distribution, up to rounding
    int8      rows of 8 bits with a scale each
    int4      4 bits with a scale and a zero for every 32; the unembedding in 8
    auto      packed where that is faster here, else plain

With int8 and int4 the target is the model with rounded weights: its distribution is what decoding preserves, and is not
the unrounded model's. Autoregressive and drafted decoding run the same forwards.

A layout is chosen by a measurement of about a second, remembered in the cache folder for the machine and the shape.
`product_times` measures the same products without a model, for whoever has yet to pick a precision.
Where a Llama-shaped body fits, `body.FewOperations` takes its place; elsewhere its linear maps alone are replaced.
Where a kernel is missing the plain modules stay, and a sentence says so. The plain weights go as the others come; the
unembedding's stay, since embeddings and drafts read their rows.

Letters: O outputs, I inputs, V vocabulary, D width.
"""

import contextlib
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cpdlm.config import WEIGHTS, ConfigError
from cpdlm.decoding.body import FewOperations, fits
from cpdlm.decoding.products import LAYOUTS, ROUNDED, Int8, NoKernel, Product
from cpdlm.files import default_cache, write_json
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.trunk import Trunk, new_cache
from cpdlm.processes import processor

FASTEST = "layouts.json"
ROWS = (1, 4, 8)  # of the products that are measured
MEASURED = 2**16  # weights of a map, from which on that tells something
STREAMED = 2**24  # weights that few processors keep in a cache between two products
PROBE = 7  # tokens
FAR = 2**15  # positions, beyond which a probe does not go
Maker = Callable[[Tensor, Tensor | None], Product]


@dataclass
class Prepared:
    """weights: how they are held now. sentences: what a user should know."""

    weights: str = "plain"
    few_operations: bool = False
    sentences: list[str] = field(default_factory=list)


@torch.no_grad()
def prepare(model: LanguageModel, weights: str = "auto") -> Prepared:
    """Change the model in place, for decoding on the processor it is on; it can then be neither trained nor saved.

    Raises ConfigError for an unknown word, a model in training mode or one that is prepared otherwise already.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights} is not a way to hold them; give one of {', '.join(WEIGHTS)}")
    if model.weights != "plain" and weights not in ("auto", model.weights):
        raise ConfigError(f"the model is prepared already (weights={model.weights}); load it again")
    if model.training and not model.frozen_target:
        raise ConfigError("the model is in training mode, and a prepared one cannot train; call model.eval() first")
    if weights == "plain" or model.weights != "plain":
        return Prepared(model.weights)
    embedding = model.trunk.embedding
    if embedding.device.type != "cpu":
        told = (
            [] if weights == "auto" else [f"weights={weights} is for processors; on {embedding.device} they stay plain"]
        )
        return Prepared(sentences=told)
    done = Prepared(weights if weights in ROUNDED else "packed")
    maker = _Makers(ROUNDED[weights] if weights in ROUNDED else LAYOUTS[_fastest(model)])
    done.few_operations = _runs_in_few_operations(model)
    if done.few_operations:
        model.trunk.body = FewOperations(model.trunk.body, maker)  # type: ignore[assignment]
    elif maker.kind is LAYOUTS["joined"] or not _replaced_in(model, maker):
        told = [] if weights in ("auto", "packed") else [_stays(weights, maker.lacking or "no map could be replaced")]
        return Prepared(sentences=told)
    _unembedding(model, maker)
    _heads(model, maker.kind)
    if maker.plain == maker.made:
        return Prepared(few_operations=done.few_operations, sentences=[_stays(weights, maker.lacking)])
    if maker.plain:
        done.sentences.append(f"{maker.plain} of {maker.made} linear maps stay plain: {maker.lacking}")
    if weights in ROUNDED:
        done.sentences.append(
            f"weights={weights}: the target is this model with rounded weights; drafts keep that distribution, "
            "which is not the unrounded model's"
        )
    model.weights = done.weights
    return done


def paying(draft: str, weights: str) -> str:
    """A model's own draft, by how its weights are held now: with rounded ones a forward of more tokens takes clearly
    longer, so that branches make way for the chain (results/benchmarks/tasks_int4_branched.json)."""
    return draft.replace("branched", "chain") if weights in ROUNDED else draft


def _stays(weights: str, reason: str) -> str:
    return f"weights={weights} is not to be had here, the weights stay plain: {reason}"


class _Makers:
    """Makes products of a kind, or of plain weights where that has no kernel; counts both."""

    def __init__(self, kind: type[Product]) -> None:
        self.kind = kind
        self.made = self.plain = 0
        self.lacking = ""

    def __call__(self, weight_OI: Tensor, bias_O: Tensor | None) -> Product:
        self.made += 1
        try:
            return self.kind(weight_OI, bias_O)
        except NoKernel as error:
            self.plain, self.lacking = self.plain + 1, str(error)
            return LAYOUTS["joined"](weight_OI, bias_O)


# --- the body ---------------------------------------------------------------------------------------------------------


def _runs_in_few_operations(model: LanguageModel) -> bool:
    """Whether the body fits, and each of its layers gives what it gave: at positions near and far, under a mask, and
    the first one behind a cache. Layers of one model may differ, as may positions (SmolLM3, Ministral 3)."""
    body: Any = model.trunk.body
    if model.attention_window is not None or not fits(body):
        return False
    try:
        return all(_layer_is_ours(body, index) for index in range(len(body.layers)))
    except Exception:  # whatever a body of another kind makes of it
        return False


def _layer_is_ours(body: Any, index: int) -> bool:
    tried = _tried if index == 0 else _tried_at_once
    few: Any = FewOperations(_of_one_layer(body, index), LAYOUTS["joined"])
    return _near(tried(Trunk(few)), tried(Trunk(_of_one_layer(body, index))))


def _of_one_layer(body: Any, index: int) -> Any:
    """The body with one of its layers alone; everything else is shared with it."""
    short = copy.copy(body)
    # Parameters, buffers, modules and hooks are held in dictionaries, which the copy would share.
    vars(short).update({key: each.copy() for key, each in vars(body).items() if isinstance(each, dict)})
    short.layers = nn.ModuleList([body.layers[index]])
    short.config = copy.deepcopy(body.config)
    text = short.config.get_text_config(decoder=True)
    text.num_hidden_layers = 1
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = kinds[index : index + 1]
    return short


def _tried(trunk: Trunk) -> list[Tensor]:
    tokens_BT, cache = _probe(trunk), new_cache()
    states = [trunk(tokens_BT), *_tried_at_once(trunk)]
    states += [trunk(part_BS, cache=cache) for part_BS in tokens_BT.split([3, 3, 1], dim=1)]
    return states


def _tried_at_once(trunk: Trunk) -> list[Tensor]:
    """One forward under a mask: a row at the first positions, one at the last that the model has (of FAR)."""
    tokens_BT = _probe(trunk)
    seen = torch.ones(2, 1, PROBE, PROBE, dtype=torch.bool, device=tokens_BT.device).tril()
    seen[:, :, 3:, 1] = False
    positions = min(getattr(trunk.config, "max_position_embeddings", None) or PROBE, FAR)
    far_B1 = torch.tensor([[0], [max(0, positions - PROBE)]], device=tokens_BT.device)
    return [trunk(tokens_BT, torch.arange(PROBE, device=tokens_BT.device) + far_B1, mask=seen)]


def _probe(trunk: Trunk) -> Tensor:
    vocabulary = trunk.embedding
    return torch.arange(2 * PROBE, device=vocabulary.device).remainder(len(vocabulary)).view(2, PROBE)


def _near(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    narrow = theirs[0].dtype.itemsize < 4
    most = (5e-2 if narrow else 1e-4) * max(1.0, *(float(each.abs().max()) for each in theirs))
    return all(bool((one - other).abs().max() <= most) for one, other in zip(ours, theirs, strict=True))


def _replaced_in(model: LanguageModel, maker: _Makers) -> bool:
    """Replace every linear map of a body of any kind, once the first layer has been seen to run with its own
    replaced."""
    exact = maker.kind not in ROUNDED.values()
    try:
        before, first = _tried(model.trunk), model.trunk.layers()[0]
    except Exception:
        return False
    kept = _replaced(first, maker)
    try:
        after = _tried(model.trunk)
        holds = bool(kept) and (_near(after, before) if exact else all(bool(each.isfinite().all()) for each in after))
    except Exception:  # a body that reads the weights of its maps by itself
        holds = False
    if not holds:
        for parent, name, module in kept:
            setattr(parent, name, module)
        return False
    del kept
    _replaced(model.trunk.body, maker)
    return True


def _replaced(parent: nn.Module, maker: _Makers) -> list[tuple[nn.Module, str, nn.Module]]:
    """Linear maps of transformers and torch; what adapters (peft) wrap is left as it is. -> what stood there."""
    found: list[tuple[nn.Module, str, nn.Module]] = []
    if hasattr(parent, "base_layer"):
        return found
    for name, child in list(parent.named_children()):
        if type(child) is nn.Linear or type(child) is Conv1D:
            product = maker(child.weight if type(child) is nn.Linear else child.weight.t(), child.bias)
            if type(product) is maker.kind:
                found.append((parent, name, child))
                setattr(parent, name, product)
        else:
            found += _replaced(child, maker)
    return found


def _unembedding(model: LanguageModel, maker: _Makers) -> None:
    """The target's own product with the unembedding; not of a self target by eq. 11, where heads read its rows."""
    old = model.unembedding
    if (
        type(old) is not nn.Linear
        or not (model.frozen_target or model.first_is_tied)
        or maker.kind is LAYOUTS["joined"]
    ):
        return
    maker.kind = Int8 if maker.kind in ROUNDED.values() else maker.kind
    new = maker(old.weight, old.bias)
    new.weight = old.weight
    model.unembedding = new  # type: ignore[assignment]


def _heads(model: LanguageModel, kind: type[Product]) -> None:
    """What drafts are made with, in 8 bits where that is fastest: a draft is accepted by the distribution it came from,
    whatever that is."""
    maker = _Makers(Int8 if kind in ROUNDED.values() or torch.cpu._is_vnni_supported() else kind)
    for part in filter(None, (model.anchor, model.heads and model.heads.link)):
        _replaced(part, maker)
    if model._draft_table_VD is not None:
        model.draft_product = maker(model._draft_table_VD, None)


# --- the measurement --------------------------------------------------------------------------------------------------


def _fastest(model: LanguageModel) -> str:
    """The name of the layout in which this processor multiplies the largest maps of the trunk fastest."""
    maps = [each.weight for each in model.trunk.body.modules() if type(each) is nn.Linear]
    largest = max(maps, key=torch.numel, default=torch.empty(0))
    if largest.numel() < MEASURED:
        return "transposed"
    weights = [each for each in maps if each.shape == largest.shape][:8]
    path, kept = default_cache() / FASTEST, {}
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_text())
    key = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {largest.dtype}, "
    key += "x".join(map(str, largest.shape))
    if kept.get(key) not in LAYOUTS:
        taken = {name: _milliseconds(kind, weights) for name, kind in LAYOUTS.items()}
        kept[key] = min(taken, key=lambda name: taken[name])
        with contextlib.suppress(OSError):
            write_json(path, kept)
    return str(kept[key])


def product_times(width: int) -> dict[str, float]:
    """ms of products with maps of a model of that width, 16M weights at most, by precision: each in its fastest
    layout."""
    outputs, taken = min(4 * width, STREAMED // width), {}
    number = min(64, STREAMED // (outputs * width))
    for name in ("bfloat16", "float32"):
        maps = [torch.ones(outputs, width, dtype=getattr(torch, name)) for _ in range(number)]
        taken[name] = min(_milliseconds(kind, maps, times=3) for kind in LAYOUTS.values())
    return taken


def _milliseconds(kind: type[Product], weights: Sequence[Tensor], times: int = 7) -> float:
    """Of one product with each of the weights, by 1, by 4 and by 8 rows: the least of some turns, summed."""
    try:
        products = [kind(weight, None) for weight in weights]
    except NoKernel:
        return float("inf")
    total = 0.0
    for rows in ROWS:
        x = torch.randn(rows, weights[0].shape[1], dtype=weights[0].dtype)
        taken = []
        for _ in range(times):
            began = time.perf_counter()
            for product in products:
                product(x)
            taken.append(time.perf_counter() - began)
        total += min(taken) * 1e3
    return total
