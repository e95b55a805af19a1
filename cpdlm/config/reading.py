"""Words and saved files -> a checked Config, and back."""

import copy
import functools
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cpdlm.config.checks import check, check_choice
from cpdlm.config.presets import PRESETS
from cpdlm.config.settings import Config, ConfigError, flat, leaves
from cpdlm.config.words import first_line, nearest

# Earlier names of settings, still read on the command line, in saved configurations and in records.
ALIASES = {
    "loss.shortlist": "loss.draft_vocabulary",
    "decode.shortlist": "decode.draft_vocabulary",
    "anchor": "link",
    "model.anchor_normed": "model.draft_normed",
}
VALUES = {"link": {"token": "first"}}  # earlier names of values
# Settings that are gone, and why; they are dropped wherever they are read.
OBSOLETE = {
    "data.processes": "a corpus is read by one process and tokenised by the threads of the tokenizer",
    "model.draft_depth": "that map has one hidden layer",
    "model.adapter_layers": "drafts have no adapters in the trunk",
    "model.adapter_rank": "drafts have no adapters in the trunk",
}
WIDTH = "model.anchor_width"  # older records have 0, for half the trunk's width


def parse(arguments: list[str]) -> Config:
    """`key=value` words -> a checked Config; raises ConfigError."""
    given: dict[str, str] = {}
    check_words(arguments)
    for word in arguments:
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{word}' is not a setting; write KEY=VALUE, for example rank=8 (--help lists them)")
        if key in OBSOLETE:
            print(f"{word} is ignored: {OBSOLETE[key]}", file=sys.stderr)
        given |= {"model.trunk": value, "model.family": "pretrained"} if key == "model" else {key: value}
    return resolve(expand(given))


def check_words(words: list[str]) -> None:
    """ConfigError for a word with bytes that are not UTF-8, which no configuration or record can hold."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            shown = word.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise ConfigError(f"{shown} is not UTF-8; give the file or folder a name that is") from error


def expand(given: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides of the named presets, in their order, then the given ones; raises ConfigError."""
    merged: dict[str, Any] = {}
    for name in str(given.get("preset", "none")).split(","):
        check_choice("preset", name, tuple(PRESETS))
        merged |= PRESETS[name]
    return merged | _renamed(given)


def resolve(overrides: Mapping[str, Any]) -> Config:
    """Dotted overrides on the defaults -> a checked Config; raises ConfigError."""
    known = leaves()
    merged = copy.deepcopy(_defaults())
    for key, value in _renamed(overrides).items():
        if key not in known:
            _refuse_unknown(key, tuple(known))
        try:
            OmegaConf.update(merged, key, value)
            OmegaConf.select(merged, key, throw_on_missing=True)  # an interpolation that leads nowhere raises here
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"{key}={value!r}: expected {known[key].type}; the default is {known[key].default!r}"
            ) from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check(config)
    # Not rules of `check`: runs that were finished before them are still read.
    alone = [name for name in config.preset.split(",") if name.endswith("-heads") and not config.model.trunk]
    if alone:
        made = alone[0].replace("-heads", "-trunk,trunk")
        raise ConfigError(
            f"preset={alone[0]} is for heads on a frozen trunk: make one with preset={made}, and give its folder "
            "as model.trunk=RUN"
        )
    if config.train.decode_prompts > config.decode.prompts:
        raise ConfigError(
            f"train.decode_prompts={config.train.decode_prompts} are more than decode.prompts={config.decode.prompts}; "
            "raise that"
        )
    return config


@functools.cache
def _defaults() -> DictConfig:
    """All settings with their defaults, made once since that is most of the time of reading. Copy before writing."""
    made: DictConfig = OmegaConf.structured(Config)
    return made


def upgrade(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration, nested, with the present settings and names."""
    nested: dict[str, Any] = {}
    for key, value in _renamed(flat(saved)).items():
        *groups, name = key.split(".")
        holder = nested
        for group in groups:
            holder = holder.setdefault(group, {})
        holder[name] = value
    return nested


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionary, as saved with a run and in its record; without what logs in at tracking.uri."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(config))
    plain["tracking"]["uri"] = without_credentials(plain["tracking"]["uri"])
    assert isinstance(plain, dict)
    return plain


def without_credentials(text: str) -> str:
    """An address, or a command that holds some, without user names, passwords and tokens."""
    text = re.sub(r"://[^\s/?#]*@", "://", text)
    return re.sub(r"(?i)([?&;][^=\s&;]*(?:passw|pwd|token|secret|key|sig|auth)[^=\s&;]*=)[^&;\s'\"]*", r"\1***", text)


def from_dict(plain: Mapping[str, Any]) -> Config:
    """The Config that `to_dict` wrote; raises ConfigError on a foreign one. Nothing in it is resolved: it may come from
    anyone, and ${oc.env:NAME} would read this machine's environment."""
    for key, value in flat(plain).items():
        if "${" in str(value):
            raise ConfigError(f"{key}={value!r}: saved settings are values; write what ${{...}} stands for")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(_defaults(), upgrade(plain)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"this configuration was written by another version: {first_line(error)}") from error
    assert isinstance(config, Config)
    check(config)
    return config


def as_yaml(config: Config) -> str:
    """As saved in a run's config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def help_text() -> str:
    """What `--help` says of the settings: each with type, default and a line of meaning."""
    lines = [
        "model=NAME is short for model.trunk=NAME model.family=pretrained: a Hugging Face folder or name, a GGUF file, "
        "smollm2.",
        "",
        "One cell: train, evaluate, decode, write one record. Later words win; a preset is applied first.",
        "presets: " + ", ".join(PRESETS),
        "",
    ]
    for key, entry in leaves().items():
        lines.append(f"  {key + '=' + str(entry.default):<36} {entry.type:<6} {entry.metadata['help']}")
    return "\n".join(lines)


def _renamed(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The same overrides in the same order, each by its present name."""
    found = {ALIASES.get(key, key): value for key, value in overrides.items() if key not in OBSOLETE}
    if WIDTH in found:
        if units := int(found.pop(WIDTH)):
            raise ConfigError(f"{WIDTH}={units} is now model.draft_width, a multiple of the trunk's width; type it so")
        found["model.draft_width"] = 0.5
    return {
        key: VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value for key, value in found.items()
    }


def _refuse_unknown(key: str, known: tuple[str, ...]) -> NoReturn:
    same = [name for name in known if name.split(".")[-1] == key]
    guess = nearest(key, known, cutoff=0.5) or nearest(key, same, cutoff=0.0)
    raise ConfigError(f"unknown setting '{key}'{guess} (--help lists them all)")
