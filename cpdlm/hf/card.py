"""The model card of an exported folder, from what its run measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from cpdlm.config import Config
from cpdlm.data.pretrained_files import described
from cpdlm.model.language_model import LanguageModel
from cpdlm.training.checkpoints import RunError, trunk_source


def card(run: Path, config: Config, model: LanguageModel, name: str) -> str:
    """The model card, from what the run measured; what it did not measure is said to be missing, what the trunk's source does
    not say of it is left out."""
    evaluated, decoded = read_json(run / "evaluate.json"), read_json(run / "decode.json")
    data = (evaluated or {}).get("data", {})
    target = (
        "the frozen trunk's own next-token law, which the heads accelerate"
        if model.frozen_target
        else "the model's own next-token law"
    )
    million = sum(each.numel() for each in model.parameters()) / 1e6
    known: dict[str, Any] = described(config.model.trunk, trunk_source(config)) if config.is_pretrained else {}
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cpdlm", "multi-token-prediction", "speculative-decoding"],
        **known,
    )
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        f"# {name}",
        "",
        f"A {model.trunk.body.config.model_type} language model that predicts a joint law of its next {model.horizon} tokens, a mixture of rank "
        f"{model.rank} ([arXiv 2410.17765](https://arxiv.org/abs/2410.17765)), drafts from it and verifies its own draft: "
        "`generate` writes several tokens per pass, with the law of plain decoding.",
        "",
        "| | |",
        "|---|---|",
        f"| rank, horizon, anchor | {model.rank}, {model.horizon}, {config.anchor} |",
        f"| what decoding preserves | {target} |",
        f"| parameters | {million:.1f} M |",
        f"| context | {model.context} tokens |",
        f"| tokenizer | {config.data.tokenizer}, {model.vocab_size} tokens |",
        f"| data | {_data(config, data)} |",
        f"| training | {config.optim.steps} steps of {config.data.batch_rows} x {config.data.context} tokens, seed {config.seed} |",
    ]
    if model.draft_ids is not None:
        covered = f", {decoded['shortlist_coverage']:.1%}" if decoded is not None else ""
        lines.append(
            f"| drafts | from the {len(model.draft_ids):,} most frequent tokens{covered} of the training text; what is written may "
            "be any token |"
        )
    bits = (evaluated or {}).get("likelihood", {}).get("bits_per_byte")
    if bits is not None:
        lines.append(f"| test | {bits:.3f} bits per byte |")
    lines += ["", "## Use", "", "With the package `cpdlm` installed (`pip install .` in its repository):", ""]
    lines += ["```python", *_USE.format(name=name).splitlines(), "```", "", "## Measured", ""]
    if run.is_dir():
        command = (evaluated or {}).get("command", "# the run was not evaluated: its command is not known")
        command = " ".join(word for word in command.split(" ") if not word.startswith("tracking."))
        made_by = [command, f"python -m cpdlm.hf.export {config.output}/{config.run_name} {name}"]
        lines += _measured(decoded)
    else:
        made_by = [f"python -m cpdlm.hf.export {run} {name}"]
        lines += ["These heads come with `cpdlm`, whose README says how fast they were."]
    lines += ["", "## Made by", "", "```bash", *made_by, "```", ""]
    return "\n".join(lines)


_USE = """\
import cpdlm.hf  # registers the classes; no remote code
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
text = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**text, max_new_tokens=48)[0], skip_special_tokens=True))"""


def _data(config: Config, data: dict[str, Any]) -> str:
    sources = ", ".join(
        f"{each['name']} {each.get('version', '')} ({each.get('licence', 'licence unknown')}"
        f"{', held out for testing' if each.get('held_out') else ''})"
        for each in data.get("sources") or []
        if isinstance(each, dict) and "name" in each
    )
    train = data.get("splits", {}).get("train")
    size = f", {train['tokens']:,} training tokens" if train else ""
    return f"{config.corpus}{': ' + sources if sources else ''}{size}"


def _measured(decoded: dict[str, Any] | None) -> list[str]:
    if decoded is None:
        return ["Its speed was not measured."]
    hardware = decoded["origin"]["hardware"]
    rows = [
        f"| {name} | {mode['tokens_per_pass']['mean']:.2f} | {mode['speedup']['median']:.2f} "
        f"[{mode['speedup']['low']:.2f}, {mode['speedup']['high']:.2f}] |"
        for name, mode in decoded["modes"].items()
    ]
    first = next(iter(decoded["modes"].values()))
    return [
        "| | tokens per pass | speed-up over plain decoding |",
        "|---|---|---|",
        *rows,
        "",
        f"{first['prompts']} prompts, {first['new_tokens']} new tokens each, batch 1; {hardware['processor']}, "
        f"{hardware['cores']} cores, accelerator: {hardware['accelerator']}.",
    ]


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file; raises RunError on a damaged one."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error})") from error
    return content if isinstance(content, dict) else None
