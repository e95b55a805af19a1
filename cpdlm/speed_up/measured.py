"""What heads are worth on this machine: drafts chosen on a few prompts, then timed on others beside what needs none."""

import hashlib
import itertools
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cpdlm.bench.acceptance import acceptance
from cpdlm.bench.compare import Protocol, Timing, interleaved, rate_ratio
from cpdlm.bench.contenders import Ours
from cpdlm.bench.hardware import hardware
from cpdlm.bench.memory import working_memory
from cpdlm.config import Config
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.corpus import load_corpus
from cpdlm.data.openings import openings
from cpdlm.data.stored import Corpus
from cpdlm.data.target import Target
from cpdlm.decoding import Sampling, prepare
from cpdlm.files import write_json
from cpdlm.model.language_model import LanguageModel
from cpdlm.progress import Bar
from cpdlm.training import checkpoints, run

MEASURED = "decode.json"
# (draft, nodes): what is tried for a few texts before the best is measured.
CANDIDATES = (("branched", 5), ("lookup+branched", 5), ("tree", 5), ("tree", 8), ("tree", 16), ("lookup+tree", 16))
TRIED = 3  # prompts, of the validation split
METHODS = {"plain": "AR", "lookup": "prompt lookup", "heads": "this draft"}  # in a table


@dataclass(frozen=True)
class Decoders:
    """The model, ready for this machine, and the texts that it continues."""

    model: LanguageModel
    config: Config
    prompts: dict[str, list[Tensor]]  # of the validation and test splits
    weights: dict[bool, int]  # bytes, with and without heads, before they were laid out anew

    def timings(self, split: str, drafts: dict[str, tuple[str, int]], sampling: Sampling, progress: Bar) -> Any:
        """Timing by name. drafts: (draft, nodes) by name."""
        decode = self.config.decode
        contenders = {
            (name, "model"): Ours(self.model, decode.new_tokens, sampling, draft, nodes)
            for name, (draft, nodes) in drafts.items()
        }
        protocol = Protocol.of(decode, self.config.seed)
        if split == "validation":
            protocol = replace(protocol, repeats=1, warmups=1)
        found = interleaved(
            contenders, {"model": self.model}, self.prompts[split], protocol, lambda line: None, progress.update
        )
        return {name: timing for (name, _), timing in found.items()}

    def memory(self, draft: tuple[str, int], sampling: Sampling) -> int:
        """Bytes of weights and of all that a text takes beside them."""
        ours = Ours(self.model, self.config.decode.new_tokens, sampling, *draft)
        prompt_T = self.prompts["test"][0]
        working = working_memory(lambda: ours(prompt_T, 0), self.model.trunk, prompt_T.device).whole
        return working + self.weights[draft[0] not in ("none", "lookup")]


def measure_drafts(config: Config, command: str, say: run.Say) -> dict[str, Any]:
    """The content of RUN/decode.json; of an earlier call if settings and weights are the same.

    Its modes, "greedy" and "sampling", hold AR ("plain"), prompt lookup and the drafts that were chosen ("heads"); the
    run's config then says which these are.
    """
    home = checkpoints.run_folder(config)
    identity = hashlib.sha256((home / checkpoints.WEIGHTS).read_bytes() + Target.of(config).sha256.encode()).hexdigest()
    found = checkpoints.read_json(home / MEASURED)
    is_known = checkpoints.has_draft_vocabulary(home, config.decode.draft_vocabulary)
    if found is not None and found.get("measured_weights") == identity and is_known:
        return found
    began, device = time.monotonic(), run.training_device()
    corpus, target = load_corpus(config), run.frozen_model(config)
    model = checkpoints.load_model(home, target).to(device)
    listed = None
    if config.decode.draft_vocabulary:
        text, _ = run.training_text(config, corpus, target, say)
        listed = run.draft_vocabulary(config.decode.draft_vocabulary, text)
        model.use_draft_vocabulary(torch.from_numpy(listed.ids))
    sizes = [(each.requires_grad, each.numel() * each.element_size()) for each in model.parameters()]
    weights = {False: sum(size for trained, size in sizes if not trained), True: sum(size for _, size in sizes)}
    prepare(model)
    prompts = {split: _prompts(config, corpus, split) for split in ("validation", "test")}
    decoders = Decoders(model, config, prompts, weights)
    decode = config.decode
    total = len(CANDIDATES) * (TRIED + 1) + 6 * (decode.prompts * decode.repeats + decode.warmups)
    progress = Bar(total=total, unit="text", desc="trying drafts")
    tried = decoders.timings("validation", {f"{d} {n}": (d, n) for d, n in CANDIDATES}, Sampling(0.0), progress)
    best = dict(zip(tried, CANDIDATES, strict=True))[max(tried, key=lambda name: tried[name].rate())]
    modes = {}
    for name, sampling in {
        "greedy": Sampling(0.0),
        "sampling": Sampling(decode.temperature, decode.top_k, decode.top_p),
    }.items():
        progress.set_description_str(f"decoding, {name}", refresh=False)
        modes[name] = _mode(decoders, best, sampling, progress)
    progress.close()
    chosen = replace(config, decode=replace(decode, draft=best[0], nodes=best[1]))
    checkpoints.open_run(home, chosen)
    content = {
        "command": command,
        "data": corpus.describe(),
        "settings": asdict(chosen.decode),
        "measured_weights": identity,
        "shortlist_coverage": listed.coverage if listed is not None else None,
        "tried": {name: timing.rate() for name, timing in tried.items()},
        "modes": modes,
        "seconds": time.monotonic() - began,
        "origin": {"hardware": hardware()},
    }
    checkpoints.save_draft_vocabulary(home, chosen, torch.from_numpy(listed.ids) if listed is not None else None)
    write_json(home / MEASURED, content)
    return content


def _prompts(config: Config, corpus: Corpus, split: str) -> list[Tensor]:
    """As those that the heads were trained behind, where the model wrote their text, else pieces of the corpus."""
    data, decode = config.data, config.decode
    wanted, device = TRIED if split == "validation" else decode.prompts, run.training_device()
    if data.text == "corpus" or data.prompts == "windows":
        few = replace(config, decode=replace(decode, prompts=wanted))
        return list(TokenDataModule(few, corpus).prompts(split).to(device))
    room = data.context - decode.new_tokens
    found = itertools.islice(openings(data.prompts, corpus.split(split), corpus.tokenizer, room), wanted)
    return [torch.tensor(ids, device=device) for ids in found]


def _mode(decoders: Decoders, best: tuple[str, int], sampling: Sampling, progress: Bar) -> dict[str, Any]:
    drafts = {"plain": ("none", 8), "lookup": ("lookup", 8), "heads": best}
    timings: dict[str, Timing] = decoders.timings("test", drafts, sampling, progress)
    base = timings["plain"]
    ours = acceptance(timings["heads"].decoded, decoders.model.horizon)
    return {
        "prompts": len(decoders.prompts["test"]),
        "new_tokens": decoders.config.decode.new_tokens,
        **ours,
        "speedup": rate_ratio(timings["heads"], base),
        "methods": {
            name: {
                "tokens_per_second": timing.rate(),
                "tokens_per_forward": acceptance(timing.decoded, 2)["tokens_per_pass"]["mean"],
                "speedup": rate_ratio(timing, base),
                "memory": decoders.memory(drafts[name], sampling),
            }
            for name, timing in timings.items()
        },
    }


def lines(model: str, found: dict[str, Any], width: int) -> list[str]:
    """The table of what was measured, and one sentence on it. width: columns there are."""
    rows = []
    for mode, content in found["modes"].items():
        rows.append("greedy" if mode == "greedy" else f"sampling at T = {found['settings']['temperature']:g}")
        for name, shown in METHODS.items():
            method = content["methods"][name]
            cells = [
                f"{method['tokens_per_second']:7.1f} tokens/s",
                f"{method['tokens_per_forward']:5.2f} per forward",
                "{median:5.2f} x [{low:.2f}, {high:.2f}]".format(**method["speedup"]),
                f"{method['memory'] / 2**20:7,.0f} MiB",
            ]
            line = f"  {shown:<13} " + "  ".join(cells)
            rows += [line] if len(line) <= width else [f"  {shown}", *(f"    {c.strip()}" for c in cells)]
    said = [f"{_verdict(mode['speedup'])} {name}" for name, mode in found["modes"].items()]
    draft = f"{found['settings']['draft']}, {found['settings']['nodes']} nodes"
    pays = any(mode["speedup"]["low"] > 1 for mode in found["modes"].values())
    return [
        *rows,
        "",
        f"On this machine it {'pays' if pays else 'does not pay'}: {model} with these heads ({draft}) is "
        f"{' and '.join(said)}; the distribution of its output is unchanged.",
    ]


def _verdict(speedup: dict[str, float]) -> str:
    if speedup["low"] > 1:
        return f"{speedup['median']:.2f} times as fast"
    return "slower" if speedup["high"] < 1 else "not surely faster"
