"""Training text by the model itself: what decoding writes, the same for every cell, kept whole when a run is killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cpdlm.config import ConfigError, resolve
from cpdlm.data.stored import TokenSplit
from cpdlm.decoding import Sampling, decode
from cpdlm.model.language_model import LanguageModel, build_language_model
from cpdlm.training import self_text
from cpdlm.training.self_text import PROMPT, Writing, written_text

V, EOS, CONTEXT = 40, 39, 48
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    made = build_language_model(
        resolve(
            {
                "size": "micro",
                "rank": 1,
                "horizon": 1,
                "data.context": CONTEXT,
                "decode.prompt_tokens": 8,
                "decode.new_tokens": 8,
            }
        ),
        V,
    )
    with torch.no_grad():
        made.trunk.embedding.mul_(8)
    return made.eval()


@pytest.fixture(scope="module")
def split() -> TokenSplit:
    draw = np.random.default_rng(0)
    lengths = draw.integers(40, 90, size=20)
    tokens = draw.integers(0, EOS, size=lengths.sum()).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens[offsets[1:] - 1] = EOS
    return TokenSplit(tokens, offsets, np.zeros(20, np.int32), lengths, ["a"])


def documents(text: TokenSplit) -> list[list[int]]:
    return [text.tokens[a:b].tolist() for a, b in zip(text.offsets[:-1], text.offsets[1:], strict=True)]


def test_documents_begin_with_prompts_and_go_on_as_decoding_does(
    model: LanguageModel, split: TokenSplit, tmp_path: Path
) -> None:
    text, origin = written_text(model, split, Writing("greedy", 300, CONTEXT, EOS), tmp_path, {"trunk": "x"}, CPU)
    assert len(text.tokens) == text.offsets[-1] >= 300 and text.tokens.dtype == split.tokens.dtype
    stream = " ".join(map(str, split.tokens.tolist()))
    for document in documents(text):
        assert " ".join(map(str, document[:PROMPT])) in stream and EOS not in document[:-1]
        assert document[-1] == EOS or len(document) == CONTEXT
        prompt_T = torch.tensor(document[:PROMPT])
        assert decode(model, prompt_T, CONTEXT - PROMPT, Sampling(0.0), eos=EOS).tokens == document[PROMPT:]
    short, _ = written_text(model, split, Writing("greedy", 300, CONTEXT - 8, EOS), tmp_path, {"trunk": "x"}, CPU)
    assert max(map(len, documents(short))) == CONTEXT - 8 < model.context
    assert origin["trunk"] == "x" and origin["temperature"] == 0 and origin["prompt_tokens"] == PROMPT
    sampled, _ = written_text(model, split, Writing("sampled", 300, CONTEXT, EOS), tmp_path, {"trunk": "x"}, CPU)
    assert documents(sampled) != documents(text)
    assert [each[:PROMPT] for each in documents(sampled)] == [each[:PROMPT] for each in documents(text)]


def test_what_is_written_stays_and_a_killed_run_goes_on(
    model: LanguageModel, split: TokenSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "BATCH", 3)
    whole, origin = written_text(
        model, split, Writing("sampled", 400, CONTEXT, EOS), tmp_path / "a", {"trunk": "x"}, CPU
    )
    calls = 0
    real = self_text.decode_batch

    def counted(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(self_text, "decode_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        written_text(model, split, Writing("sampled", 400, CONTEXT, EOS), tmp_path / "b", {"trunk": "x"}, CPU)
    resumed, again = written_text(
        model, split, Writing("sampled", 400, CONTEXT, EOS), tmp_path / "b", {"trunk": "x"}, CPU
    )
    assert documents(resumed) == documents(whole) and origin == again
    calls = 10
    kept, _ = written_text(model, split, Writing("sampled", 400, CONTEXT, EOS), tmp_path / "b", {"trunk": "x"}, CPU)
    assert calls == 10 and documents(kept) == documents(whole), "nothing is written twice"
    _, other = written_text(model, split, Writing("sampled", 400, CONTEXT, EOS), tmp_path / "b", {"trunk": "y"}, CPU)
    assert calls > 10 and other["trunk"] == "y", "another model's text is another text"


def test_too_few_prompts_are_named(model: LanguageModel, split: TokenSplit, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.text=greedy: the corpus has prompts for .* data.states=90000"):
        written_text(model, split, Writing("greedy", 90_000, CONTEXT, EOS), tmp_path, {}, CPU)
