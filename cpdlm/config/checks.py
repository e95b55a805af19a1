"""What a configuration must satisfy: choices, ranges, and rules between settings, which name both values."""

from collections.abc import Iterator
from typing import Any

from cpdlm.config.settings import CHOICES, FAMILIES, WITHIN, Config, ConfigError, flatten, leaves
from cpdlm.config.words import nearest

MOST_TOKENS = 2**20  # of a vocabulary that is made here
PRETRAINED = "a Hugging Face folder or name, a GGUF file, smollm2"
WEIGHTS = ("auto", "plain", "packed", "int8", "int4")  # how decoding may hold them: cpdlm.decoding.prepare


def check(config: Config) -> None:
    """Raise ConfigError on the first rule that the configuration breaks; it names the settings and their values."""
    values = flatten(config)
    for key, allowed in CHOICES.items():
        check_choice(key, values[key], allowed)
    check_choice("model.family", config.model.family, FAMILIES)
    for rules in (_ranges, _names, _mixture, _heads, _text, _pretrained, _frozen, _processes):
        for message in rules(config):
            raise ConfigError(message)


def check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """ConfigError, with the nearest choice, where the value is none of those allowed."""
    if value not in allowed:
        guess = nearest(str(value), allowed, key + "={}")
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(allowed)}{guess}")


# Each yields what is wrong, in words.


def _ranges(config: Config) -> Iterator[str]:
    for key, value in flatten(config).items():
        yield from out_of_range(key, value)


def out_of_range(key: str, value: Any) -> Iterator[str]:
    """What is wrong with a setting's number, in words; nothing where it lies in its range."""
    rules = leaves()[key].metadata
    least, most, within = rules["least"], rules["most"], rules["within"]
    if least is not None and value < least:
        yield f"{key}={value} is too small; the least is {least}"
    if least is not None and value > most:
        yield f"{key}={value} is too large; the most is {most}"
    if within and not WITHIN[within](value):
        hint = " (greedy is always measured)" if key == "decode.temperature" else ""
        yield f"{key}={value} must lie in {within}{hint}"


def _names(config: Config) -> Iterator[str]:
    if config.name and not is_name(config.name):
        yield (
            f"name={config.name!r} must be the name of a folder, not a path: no / or \\, at most 200 characters; "
            "output=DIR says where it lies"
        )


def is_name(name: str) -> bool:
    """Whether a folder of that name lies in the folder that it is put in."""
    return 0 < len(name) <= 200 and name not in (".", "..") and not set(name) & set("/\\") and name.isprintable()


def _mixture(config: Config) -> Iterator[str]:
    horizon, context = config.horizon, config.data.context
    if horizon >= context:
        yield f"horizon={horizon} does not fit data.context={context}; lower the horizon"
    if horizon == 1 and config.rank > 1:
        yield f"rank={config.rank} needs horizon of at least 2 (horizon=1 is a next-token model)"
    if horizon == 1 and config.link != "none":
        yield f"link={config.link} needs horizon of at least 2 (horizon=1)"
    if horizon == 2 and config.link == "all":
        yield "link=all needs horizon of at least 3: with horizon=2 the only draft follows x_{t+1}; type link=first"
    if horizon == 2 and config.joint == "hmm" and config.first_is_tied:
        yield "joint=hmm needs horizon of at least 3: with horizon=2 one factor has no transition; type joint=cp"
    if config.decode.active > config.rank:
        yield f"decode.active={config.decode.active} is more than rank={config.rank} components"
    if 0 < config.decode.active < config.rank and (config.joint == "hmm" or config.model.head == "separate"):
        yield (
            f"decode.active={config.decode.active} needs joint=cp and model.head=shared (here joint={config.joint}, "
            f"model.head={config.model.head}); type decode.active=0"
        )
    if config.link == "all" and config.loss.objective == "eq14-marginal":
        yield "loss.objective=eq14-marginal needs link=none or first: the marginals of link=all have no closed form"
    if horizon == 1 and config.model.trunk:
        yield f"model.trunk={config.model.trunk} needs horizon of at least 2 (horizon=1 has no heads to train)"
    if horizon == 1 and config.train.decode_prompts:
        yield f"train.decode_prompts={config.train.decode_prompts}: horizon=1 drafts nothing; type 0"


def _heads(config: Config) -> Iterator[str]:
    model, separate = config.model, config.model.head == "separate"
    if model.map_rank and separate:
        yield f"model.map_rank={model.map_rank} needs model.head=shared (model.head=separate has no maps)"
    if model.component_rank and (model.map_rank or model.map_hidden or separate):
        yield (
            f"model.component_rank={model.component_rank} needs model.head=shared, model.map_rank=0 and "
            f"model.map_hidden=0 (here {model.head}, {model.map_rank}, {model.map_hidden})"
        )
    if separate and config.link == "all":
        yield "link=all needs model.head=shared (model.head=separate has no maps for a link)"
    if model.map_hidden and (model.map_rank or separate):
        yield (
            f"model.map_hidden={model.map_hidden} needs model.head=shared and model.map_rank=0 (here "
            f"model.head={model.head}, model.map_rank={model.map_rank}): a map is linear, low-rank or a perceptron"
        )
    if config.decode.draft_vocabulary and separate:
        yield (
            f"decode.draft_vocabulary={config.decode.draft_vocabulary} needs model.head=shared "
            "(model.head=separate has no common unembedding)"
        )


def _text(config: Config) -> Iterator[str]:
    data, decode = config.data, config.decode
    if decode.prompt_tokens + decode.new_tokens > data.context:
        yield (
            f"decode.prompt_tokens={decode.prompt_tokens} + decode.new_tokens={decode.new_tokens} "
            f"exceed data.context={data.context}"
        )
    if data.column and not config.corpus.startswith("hf:"):
        yield f"data.column={data.column} is for corpus=hf:NAME, and this is corpus={config.corpus}; leave it out"
    kind, _, name = data.tokenizer.partition(":")
    is_bpe = kind == "bpe" and name.isascii() and name.isdigit() and 257 <= int(name) <= MOST_TOKENS
    if data.tokenizer == "model" and not config.is_pretrained:
        preset = "preset=retrofit has data.tokenizer=model" if "retrofit" in config.preset else "data.tokenizer=model"
        yield f"{preset}, that of a pretrained model: type model=NAME ({PRETRAINED})"
    elif not (data.tokenizer in ("bytes", "model") or is_bpe or (kind == "hf" and name)):
        yield (
            f"data.tokenizer={data.tokenizer!r}: write bytes, bpe:SIZE with SIZE from 257 to {MOST_TOKENS}, hf:NAME, "
            "or, with a pretrained trunk (model=NAME), model"
        )


def _pretrained(config: Config) -> Iterator[str]:
    model, tokenizer = config.model, config.data.tokenizer
    if config.is_pretrained and not model.trunk:
        yield f"model.family=pretrained needs the model: type model=NAME ({PRETRAINED})"
    if config.is_pretrained and tokenizer != "model" and not tokenizer.startswith("hf:"):
        yield (
            f"data.tokenizer={tokenizer} is not the tokenizer of the pretrained model {model.trunk}; "
            "type data.tokenizer=model (preset=retrofit does)"
        )
    if model.dtype != "float32" and not config.is_pretrained:
        yield (
            f"model.dtype={model.dtype} is for pretrained trunks (model=NAME); "
            "train.precision is for trunks that are trained here"
        )


def _frozen(config: Config) -> Iterator[str]:
    """What only heads on a frozen trunk can have."""
    data, loss, model = config.data, config.loss, config.model
    used = {
        f"loss.objective={loss.objective}": loss.objective != "joint",
        f"loss.gamma={loss.gamma}": loss.gamma != 1,
        f"loss.draft_vocabulary={loss.draft_vocabulary}": loss.draft_vocabulary > 0,
        f"loss.target_top={loss.target_top}": loss.target_top > 0,
        f"data.states={data.states}": data.states > 0,
        f"data.text={data.text}": data.text != "corpus",
    }
    for setting in [words for words, is_used in used.items() if is_used]:
        if not model.trunk:
            yield f"{setting} is for heads on a frozen model: give model=NAME (a pretrained one) or model.trunk=RUN"
        if model.head == "separate" and not setting.startswith("data."):
            yield f"{setting} needs model.head=shared (model.head=separate has unembeddings of its own)"
    if 0 < data.states < data.context:
        yield (
            f"data.states={data.states} tokens are less than one row of data.context={data.context}; "
            "raise it, or type 0 to keep none"
        )
    if loss.target_top and loss.objective == "joint":
        yield f"loss.target_top={loss.target_top}: loss.objective=joint has no target; type loss.objective=eq14"
    if loss.normaliser_tokens and not loss.target_top:
        yield f"loss.normaliser_tokens={loss.normaliser_tokens} needs loss.target_top (loss.target_top=0)"
    if data.text != "corpus" and not data.states:
        yield f"data.text={data.text} needs data.states: how many tokens the model shall write"
    if data.prompts != "windows" and data.text == "corpus":
        yield f"data.prompts={data.prompts} is for text that the model writes: type data.text=sampled or greedy"
    if config.train.recompute and model.trunk:
        yield f"train.recompute=true: model.trunk={model.trunk} is frozen and keeps no activations; leave it out"


def _processes(config: Config) -> Iterator[str]:
    nodes, devices, accumulate, rows = config.nodes, config.devices, config.train.accumulate, config.data.batch_rows
    if config.train.sharded and config.parallel != "fsdp":
        yield f"train.sharded=true needs parallel=fsdp (parallel={config.parallel} has the whole model everywhere)"
    if config.parallel == "fsdp" and config.train.decode_prompts:
        yield (
            f"train.decode_prompts={config.train.decode_prompts} needs whole weights; parallel=fsdp shards them: type 0"
        )
    step = nodes * devices * accumulate
    if rows % step:
        machines = f"nodes={nodes} x " if nodes > 1 else ""
        advice = f"try data.batch_rows={step * round(rows / step)}"
        if step > rows:
            advice = f"each needs a row of its own: lower them to {rows} together, or raise data.batch_rows"
        yield (
            f"data.batch_rows={rows} does not divide into {machines}devices={devices} x train.accumulate={accumulate}; "
            f"{advice}"
        )
