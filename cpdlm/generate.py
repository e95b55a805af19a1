"""Text from a finished model, at the keyboard: streams what is written and shows which tokens were drafted.

    python -m cpdlm.generate --model RUN --prompt 'def main(' --show

--model takes a run's folder, one that `python -m cpdlm.hf.export` wrote, or the name of a model for which heads come with this
package (smollm2; the model itself is fetched at its first use). What the model reads is the prompt as its tokenizer writes one, or,
with --chat, as its chat template writes a user's turn. The text goes to standard output, everything else
to standard error, so that the text can be piped. Slow imports come after the arguments are read.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cpdlm.config import CHOICES, ConfigError

if TYPE_CHECKING:
    from cpdlm.data.tokenizer import Tokenizer
    from cpdlm.decoding import Decoded
    from cpdlm.model.language_model import LanguageModel

NEW_TOKENS = 128
REPEATS = 3  # timed runs of --show: a single one is mostly the machine's mood
GREEN, RESET = "\033[32m", "\033[0m"
# A terminal would obey them.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m cpdlm.generate", description="Write text with a finished model.")
    made.add_argument(
        "--model", type=Path, required=True, help="folder of a finished run or an exported one, or smollm2"
    )
    made.add_argument("--prompt", help="text to continue (default: standard input, without its last newline)")
    made.add_argument(
        "--chat", action="store_true", help="put the prompt to the model as a user's turn, by its chat template"
    )
    made.add_argument(
        "--max-new-tokens", type=int, help=f"tokens to write (default: {NEW_TOKENS}, or what the context has room for)"
    )
    made.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token (default); 1: the model's law"
    )
    made.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens (default: 0, all)")
    made.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens of this much probability")
    made.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    made.add_argument(
        "--draft",
        default="chain",
        choices=["none", *CHOICES["decode.draft"]],
        help="how drafts are made (default: chain)",
    )
    made.add_argument(
        "--shortlist",
        default="own",
        choices=["own", "none"],
        help="own: draft from the model's shortlist, if it has one (default); none: from all tokens",
    )
    made.add_argument(
        "--show",
        action="store_true",
        help="drafted and accepted tokens in green; tokens per pass and per second at the end",
    )
    return made


class Incremental:
    """Ids -> text, a few at a time: what comes out is never half a character, and joined it is the text of them all.

    An incomplete character decodes to U+FFFD: up to three of them at the end are held back until more is known.
    """

    KEEP, TRIM = 16, 64  # ids that stay as context, and how many have come before older ones are dropped

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        self.ids: list[int] = []
        self.written = 0  # characters of decode(ids) that are out

    def push(self, ids: Sequence[int]) -> str:
        self.ids.extend(ids)
        text = self.decode(self.ids)
        open_end = min(3, len(text) - len(text.rstrip(_UNKNOWN)))
        new = text[self.written : len(text) - open_end]
        self.written += len(new)
        if open_end == 0 and len(self.ids) > self.TRIM:
            self.ids = self.ids[-self.KEEP :]
            self.written = len(self.decode(self.ids))
        return new

    def end(self) -> str:
        return self.decode(self.ids)[self.written :]


def load(folder: Path, shortlist: bool = True) -> tuple[LanguageModel, Tokenizer, int | list[int]]:
    """Model, tokenizer and the ids that end a text, of a run's folder, an exported one or a model with released heads; raises
    RunError or ConfigError where one is not there.

    shortlist: whether the model drafts from its own, where it has one.
    """
    from safetensors import SafetensorError

    from cpdlm.data.pretrained_files import NAMED
    from cpdlm.data.tokenizer import HubTokenizer
    from cpdlm.hf import export, released
    from cpdlm.hf.model import CpdlmForCausalLM
    from cpdlm.model.pretrained import multiplies_bfloat16
    from cpdlm.training.checkpoints import CONFIG, RunError, load_model, read_config, run_draft_vocabulary

    tokenizer: Tokenizer
    if released.is_name(folder):
        model, tokenizer = released.load(str(folder), shortlist, "" if multiplies_bfloat16() else "float32")
        eos = export.end_tokens(released.settings(str(folder)), tokenizer)
    elif (folder / CONFIG).is_file():
        model, tokenizer = load_model(folder), export.run_tokenizer(folder)
        eos = export.end_tokens(read_config(folder), tokenizer)
        if shortlist:
            model.use_draft_vocabulary(run_draft_vocabulary(folder))
    elif (folder / "config.json").is_file():
        if not (folder / "tokenizer_config.json").is_file():
            raise RunError(
                f"{folder} has no tokenizer (tokenizer_config.json); export it again with python -m cpdlm.hf.export"
            )
        try:
            wrapped = CpdlmForCausalLM.from_pretrained(folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise RunError(f"{folder} cannot be loaded ({type(error).__name__}: {reason}); export it again") from error
        model, tokenizer = wrapped.model, HubTokenizer(f"hf:{folder}", folder)
        eos = wrapped.generation_config.eos_token_id
        eos = tokenizer.eos if eos is None else eos
        if not shortlist:
            model.use_draft_vocabulary(None)
    else:
        raise RunError(
            f"{folder} is neither a run's folder (no {CONFIG}) nor an exported model (no config.json) nor one of {', '.join(NAMED)}"
        )
    export.check_vocabulary(folder, model, tokenizer)
    return model, tokenizer, eos


def run(options: argparse.Namespace, out: TextIO) -> None:
    """Write the text to `out`, the rest to standard error; raises ConfigError, RunError or ValueError on bad input."""
    import torch

    from cpdlm.decoding import Captures, Sampling, decode

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={options.max_new_tokens} writes nothing; give at least 1")
    if options.prompt == "":
        raise ConfigError("the prompt is empty; give --prompt TEXT, or text on standard input")
    model, tokenizer, eos = load(options.model, shortlist=options.shortlist == "own")
    prompt = _standard_input() if options.prompt is None else options.prompt
    ids = tokenizer.prompt(prompt, options.chat) if prompt else []
    if not ids:
        raise ConfigError("the prompt is empty; give --prompt TEXT, or text on standard input")
    room = model.context - len(ids)
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens with those that its tokenizer adds, the context of this model is {model.context}; "
            f"give at most {model.context - 1}"
        )
    new_tokens = min(NEW_TOKENS, room) if options.max_new_tokens is None else options.max_new_tokens
    if new_tokens > room:
        raise ConfigError(
            f"a prompt of {len(ids)} tokens leaves room for {room} in the context of {model.context}; "
            f"give --max-new-tokens {room} or a shorter prompt"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    terminal = out.isatty()
    coloured = options.show and terminal and not os.environ.get("NO_COLOR")
    text = Incremental(tokenizer.decode)

    def say(piece: str, drafted: bool) -> None:
        if terminal:
            piece = piece.translate(_CONTROLS)
        out.write(f"{GREEN}{piece}{RESET}" if coloured and drafted and piece else piece)
        out.flush()

    def on_tokens(tokens: list[int]) -> None:
        for index, token in enumerate(tokens):
            say(text.push([token]), drafted=index < len(tokens) - 1)

    captures = {draft: Captures(model) for draft in (options.draft, "none")}

    def write(draft: str, heard: Callable[[list[int]], None] | None = None) -> Decoded:
        generator = torch.Generator(device).manual_seed(options.seed)
        return decode(
            model,
            torch.tensor(ids, device=device),
            new_tokens,
            sampling,
            generator,
            eos=eos,
            draft=draft,
            on_tokens=heard,
            forwards=captures[draft](1, len(ids) + new_tokens, sampling, draft),
        )

    write(options.draft, on_tokens)
    say(text.end(), drafted=False)
    out.write("\n")
    if not options.show:
        return
    if coloured:
        print(f"{GREEN}green{RESET}: drafted and accepted", file=sys.stderr)
    timed = [(_timed(lambda: write(options.draft)), _timed(lambda: write("none"))) for _ in range(REPEATS)]
    ours, rate = max((mine for mine, _ in timed), key=lambda each: each[1])
    plain_rate = max(plain for _, (_, plain) in timed)
    print(
        f"{len(ours.tokens)} tokens in {ours.forwards} passes: {len(ours.tokens) / ours.forwards:.2f} tokens per pass\n"
        f"{rate:.0f} tokens/s; plain decoding of the same prompt {plain_rate:.0f} tokens/s: {rate / plain_rate:.2f} x "
        f"(the fastest of {REPEATS} runs each, by turns, without printing)",
        file=sys.stderr,
    )


def _timed(write: Callable[[], Decoded]) -> tuple[Decoded, float]:
    """What was written, and tokens per second. (A pass ends with a copy to the host, so the clock needs no more.)"""
    began = time.perf_counter()
    done = write()
    return done, len(done.tokens) / (time.perf_counter() - began)


def _standard_input() -> bytes | str:
    if sys.stdin.isatty():
        print("prompt (Ctrl-D ends it):", file=sys.stderr)
    given = sys.stdin.buffer.read()
    return given.removesuffix(b"\n").removesuffix(b"\r")


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    from transformers.utils.logging import disable_progress_bar

    from cpdlm.training.checkpoints import RunError

    disable_progress_bar()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has not all characters
    try:
        run(options, sys.stdout)
    except (RunError, ValueError) as error:  # ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the text has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
