"""The model card of an exported folder, from what its run measured."""

import contextlib
import re
import shlex
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCardData

from cpdlm.config import Config
from cpdlm.data.target import Target
from cpdlm.model.language_model import LanguageModel
from cpdlm.training.checkpoints import read_json

_CARD = """\
---
{front}
---

# {name}

A {family} language model with heads that draft its next {horizon} tokens. Their joint distribution is a mixture of
rank {rank} ([arXiv 2410.17765](https://arxiv.org/abs/2410.17765)). It verifies its own drafts, so `generate` writes
several tokens per forward, with the distribution of autoregressive decoding.

| | |
|---|---|
{facts}

## Use

With the package `cpdlm` installed (`pip install .` in its repository):

```python
import cpdlm.hf  # registers the classes; no remote code
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
text = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**text, max_new_tokens=48)[0], skip_special_tokens=True))
```

## Measured

{measured}

## Made by

```bash
{made_by}
```
"""


def card(source: Path, config: Config, model: LanguageModel, name: str) -> str:
    """The model card. It says which measurement is missing, and leaves out what the trunk's source does not say of it.

    source: the run's folder, or the name of a model with released heads. name: of the exported folder.
    """
    decoded = read_json(source / "decode.json")
    evaluated = read_json(source / "evaluate.json") or decoded or {}
    known: dict[str, Any] = Target.of(config).card
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cpdlm", "multi-token-prediction", "speculative-decoding"],
        **known,
    )
    facts = _facts(config, model, evaluated, decoded)
    if source.is_dir():
        made_by = _command(evaluated)
        if not made_by.startswith("cpdlm speed-up"):  # which exports, too
            made_by += f"\ncpdlm export {placeless(config.output)}/{config.run_name} {name}"
        measured = _measured(decoded)
    else:
        made_by = f"cpdlm export {source} {name}"
        measured = "These heads come with `cpdlm`, whose README says how fast they were."
    return _CARD.format(
        front=front.to_yaml(),
        name=name,
        family=model.trunk.body.config.model_type,
        horizon=model.horizon,
        rank=model.rank,
        facts="\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items()),
        measured=measured,
        made_by=made_by,
    )


def _cell(value: str) -> str:
    """As text of a table's cell, whatever settings a received folder names."""
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")


def _command(evaluated: dict[str, Any]) -> str:
    """What made the run, as it can be shown to others."""
    if "command" not in evaluated:
        return "# the run was not evaluated: its command is not known"
    words = evaluated["command"].split(" ")
    with contextlib.suppress(ValueError):
        words = shlex.split(evaluated["command"])
    return shlex.join(placeless(word) for word in words if not word.startswith("tracking."))


def placeless(word: str) -> str:
    """A word of a command, or a value of a setting, without where things lie on this machine: their names alone."""
    key, value = re.fullmatch(r"((?:[\w.-]+=)?(?:hf:)?)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    here = value.startswith(("/", "~")) or PureWindowsPath(value).is_absolute()
    return key + PureWindowsPath(value).name if here else word


def _facts(
    config: Config, model: LanguageModel, evaluated: dict[str, Any], decoded: dict[str, Any] | None
) -> dict[str, str]:
    own = "the frozen trunk's" if model.frozen_target else "the model's"
    data = config.data
    facts = {
        "rank, horizon, link": f"{model.rank}, {model.horizon}, {config.link}",
        "what decoding preserves": f"{own} own next-token distribution",
        "parameters": f"{sum(each.numel() for each in model.parameters()) / 1e6:.1f} M",
        "context": f"{model.context} tokens",
        "tokenizer": f"{placeless(data.tokenizer)}, {model.vocab_size} tokens",
        "data": _data(config, evaluated.get("data", {})),
        "training": f"{config.optim.steps} steps of {data.batch_rows} x {data.context} tokens, seed {config.seed}",
    }
    if model.draft_ids is not None:
        covered = f", {decoded['shortlist_coverage']:.1%}" if decoded is not None else ""
        facts["drafts"] = (
            f"from the {len(model.draft_ids):,} most frequent tokens{covered} of the training text; the output may "
            "hold any token"
        )
    bits = evaluated.get("likelihood", {}).get("bits_per_byte")
    return facts | ({"test": f"{bits:.3f} bits per byte"} if bits is not None else {})


def _data(config: Config, data: dict[str, Any]) -> str:
    sources = ", ".join(
        f"{placeless(each['name'])} {each.get('version', '')} ({each.get('licence', 'licence unknown')}"
        f"{', held out for testing' if each.get('held_out') else ''})"
        for each in data.get("sources") or []
        if isinstance(each, dict) and "name" in each
    )
    train = data.get("splits", {}).get("train")
    size = f", {train['tokens']:,} training tokens" if train else ""
    return f"{placeless(config.corpus)}{': ' + sources if sources else ''}{size}"


def _measured(decoded: dict[str, Any] | None) -> str:
    if decoded is None:
        return "Its speed was not measured."
    hardware = decoded["origin"]["hardware"]
    rows = [
        f"| {name} | {mode['tokens_per_pass']['mean']:.2f} | {mode['speedup']['median']:.2f} "
        f"[{mode['speedup']['low']:.2f}, {mode['speedup']['high']:.2f}] |"
        for name, mode in decoded["modes"].items()
    ]
    first = next(iter(decoded["modes"].values()))
    lines = [
        "| | tokens per forward | speed-up over autoregressive decoding |",
        "|---|---|---|",
        *rows,
        "",
        f"{first['prompts']} prompts, {first['new_tokens']} new tokens each, batch 1; {hardware['processor']}, "
        f"{hardware['cores']} cores, accelerator: {hardware['accelerator']}.",
    ]
    return "\n".join(lines)
