"""What a run would take, before anything is downloaded or trained: parameters, memory per process, FLOPs, days.

Counted where it can be: the model of the config is built without its numbers (fake tensors, on no device), its trunk
runs once on a micro-batch, and what autograd would keep and what is multiplied are read off. The loss is a formula
(`flops`), since it works in chunks.

Letters: B rows of a micro-batch, T position, F factors, R rank, V vocabulary, D width, K inner width of a map.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoConfig, LlamaConfig, PretrainedConfig

from cpdlm.config import Config, ConfigError
from cpdlm.config.words import first_line
from cpdlm.data.pretrained_files import free_memory
from cpdlm.data.target import Target
from cpdlm.model.build import build_language_model, parameter_counts
from cpdlm.model.heads import HeadsConfig
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.pretrained import check_layers
from cpdlm.model.trunk import Trunk
from cpdlm.training.flop_count import FlopCount
from cpdlm.training.flops import Shape, loss_flops, trunk_forwards

# Shapes of the pretrained models that presets name, so that a plan needs no download.
PUBLISHED: dict[str, Callable[[], PretrainedConfig]] = {
    "Daoguang/PyCodeGPT": lambda: GPTNeoConfig(
        vocab_size=32000,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        attention_types=[[["global", "local"], 6]],
    ),
    "meta-llama/Llama-3.1-8B": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
}


@dataclass(frozen=True)
class Plan:
    """memory: bytes on each process, by part; its sum is the peak of a step. flops: per token of the text, by part."""

    parameters: dict[str, int]
    memory: dict[str, int]
    activations_checkpointed: int  # instead, where each layer keeps its input alone and runs once more in backward
    flops: dict[str, float]
    tokens: int
    processes: int

    @property
    def flops_per_token(self) -> float:
        return sum(self.flops.values())

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())

    def tokens_per_second(self, rate: float) -> float:
        """rate: FLOP/s that one device reaches in training."""
        return self.processes * rate / self.flops_per_token

    def days(self, rate: float) -> float:
        return self.tokens / self.tokens_per_second(rate) / 86400


def make_plan(config: Config, vocab_size: int = 0, compiled: bool = True) -> Plan:
    """The plan of a config. vocab_size: where the tokenizer does not say (0: it does).

    compiled: as on a GPU, where the loss needs no float32 copy of a chunk of logits. Raises ConfigError where a shape
    is not known.
    """
    processes = config.nodes * config.devices
    rows = config.data.batch_rows // (processes * config.train.accumulate)
    own = torch.float64 if config.train.precision == "64-true" else torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True), _new_tensors_in(own):
        model = _build(config, vocab_size)
        kept, layer_bytes, trunk_flops = _run_trunk(model, config, rows)
    trains_trunk = not model.frozen_target
    tokens = config.optim.steps * config.data.batch_rows * config.data.context
    flops = {
        "trunk": trunk_flops * trunk_forwards(config),
        **loss_flops(Shape.of(config, model.vocab_size, model.trunk.width), config),
    }
    layers = len(model.trunk.layers())
    one_layer = kept // layers
    memory = _weights(model, config) | {
        "activations": kept if trains_trunk else one_layer,
        **_loss_memory(model, config, rows, compiled),
    }
    checkpointed = layers * layer_bytes + one_layer if trains_trunk else one_layer
    return Plan(parameter_counts(model), memory, checkpointed, flops, tokens, processes)


def known_vocab_size(config: Config) -> int:
    """That of the tokenizer, as far as the config says; raises ConfigError."""
    kind, _, size = config.data.tokenizer.partition(":")
    if kind == "bytes":
        return 257
    if kind == "bpe":
        return int(size)
    raise ConfigError(f"data.tokenizer={config.data.tokenizer} does not say how many tokens it has; type vocab=NUMBER")


def _build(config: Config, vocab_size: int) -> LanguageModel:
    target = Target.of(config)
    if target.kind != "pretrained":
        size = vocab_size or known_vocab_size(config)
        trunk = None
        if target.kind == "run":  # a run of ours: a trunk of the same shape
            its = replace(config, rank=1, horizon=1, link="none", model=replace(config.model, trunk=""))
            trunk = build_language_model(its, size)
        return build_language_model(config, size, trunk)
    name = target.name
    if name not in PUBLISHED:
        check_layers(name, 0, name, free_memory(name))
    try:
        shape = PUBLISHED[name]() if name in PUBLISHED else AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"model={name}: its shape is not known here ({first_line(error)}); give a folder that holds it, "
            f"or one of {', '.join(PUBLISHED)}"
        ) from error
    whole = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.model.dtype), trust_remote_code=False)
    body, unembedding = getattr(whole, whole.base_model_prefix), whole.get_output_embeddings()
    plain = LanguageModel(
        Trunk(body),
        unembedding.weight.shape[0],
        HeadsConfig(),
        context=config.data.context,
        tie_embeddings=shape.tie_word_embeddings,
    )
    if not shape.tie_word_embeddings:
        plain.unembedding.weight = unembedding.weight
    return build_language_model(config, plain.vocab_size, plain)


@contextmanager
def _new_tensors_in(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _run_trunk(model: LanguageModel, config: Config, rows: int) -> tuple[int, int, float]:
    """(bytes that autograd keeps, bytes of one layer's input, forward FLOPs per token) of a micro-batch.

    A frozen trunk is asked as if it trained: what a layer would keep is about what it holds while it runs.
    """
    model.trunk.requires_grad_(True)
    tokens_BT = torch.zeros(rows, config.data.context, dtype=torch.long)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16-mixed")
    with FlopCount() as counted, saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        hidden_BTD = model.hidden(tokens_BT)
    model.trunk.requires_grad_(not model.frozen_target)
    layer_bytes = hidden_BTD.numel() * hidden_BTD.element_size()
    return sum(kept.values()), layer_bytes, counted.total / tokens_BT.numel()


def _separate(model: LanguageModel) -> bool:
    return model.heads is not None and model.heads.separate


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _weights(model: LanguageModel, config: Config) -> dict[str, int]:
    """Weights, gradients and AdamW's two moments; under fsdp a share of each, and what is gathered at a time."""

    everything, trained = list(model.parameters()), [p for p in model.parameters() if p.requires_grad]
    share = config.nodes * config.devices if config.parallel == "fsdp" else 1
    found = {
        "weights": _size(everything) // share,
        "gradients": _size(trained) // share,
        "optimiser": 2 * _size(trained) // share,
    }
    if share > 1:
        layers = [list(layer.parameters()) for layer in model.trunk.layers()]
        inside = {id(parameter) for layer in layers for parameter in layer}
        # Embedding, unembedding and heads stay gathered from forward to backward; of the layers, one and the next.
        found["gathered"] = _size([p for p in everything if id(p) not in inside]) + 2 * max(map(_size, layers))
    return found


def _loss_memory(model: LanguageModel, config: Config, rows: int, compiled: bool) -> dict[str, int]:
    """The largest chunk, and the gradients that the loss sums in forward beside those of the step before."""
    table, width = model.unembedding.weight, model.trunk.width
    fast = 2 if config.train.precision.startswith("bf16") else table.element_size()
    logit = fast if compiled else max(4, table.element_size())
    positions = rows * config.data.context

    def chunk(positions: int, rows_each: int, tokens: int) -> float:
        each = rows_each * tokens * logit
        logits = min(max(config.loss.chunk_mib * 2**20, each), positions * each)
        # Beside them, their float32 copy in eager half precision, and about six copies of the rows that they come from.
        return logits * (1 + (fast / logit if logit > fast else 0) + 6 * width / tokens)

    has_next_token = loss_flops(Shape.of(config, model.vocab_size, model.trunk.width), config)["next token"] > 0
    table_bytes = 0 if model.frozen_target or _separate(model) else _size([table])
    most, sums = 0.0, 0
    if has_next_token:
        most = chunk(positions, 1 if model.first_is_tied else model.rank, model.vocab_size)
        sums += table_bytes
    if model.heads is not None:
        picked, maps = max(1, round(positions * config.loss.joint_fraction)), _size(model.heads.maps.values())
        window = chunk(picked, model.heads.factors * model.rank, config.loss.draft_vocabulary or model.vocab_size)
        most = max(most, window)
        sums += table_bytes + maps
        if has_next_token and not model.first_is_tied:
            sums += maps // model.heads.factors
    return {"chunk of the loss": int(most), "sums of the loss": sums}
