"""Training text by the model itself: what decoding writes, the same for every cell, kept whole when a run is killed."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from cpdlm.config import ConfigError, resolve
from cpdlm.data.stored import TokenSplit
from cpdlm.data.tokenizer import Tokenizer
from cpdlm.decoding import Sampling, decode
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from cpdlm.training import self_text
from cpdlm.training.self_text import PROMPT, Writing, packed, written_text

V, EOS, CONTEXT = 40, 39, 48
CPU = torch.device("cpu")


class Words:
    """As much of a tokenizer as the writing asks for. Ids are characters; 38 ends an answer."""

    eos = EOS

    def prompt(self, text: str) -> list[int]:
        return [ord(letter) % EOS for letter in text]

    def decode(self, ids: np.ndarray) -> str:
        return "".join(chr(EOS + int(each)) for each in ids if each != EOS)

    def conversation(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        return [1, 2, 38, 3], [False, True, True, False]


WORDS = cast(Tokenizer, Words())


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
    text, origin = written_text(model, split, Writing("greedy", 300, CONTEXT, WORDS), tmp_path, {"trunk": "x"}, CPU)
    assert len(text.tokens) == text.offsets[-1] >= 300 and text.tokens.dtype == split.tokens.dtype
    stream = " ".join(map(str, split.tokens.tolist()))
    for document in documents(text):
        assert " ".join(map(str, document[:PROMPT])) in stream and EOS not in document[:-1]
        assert document[-1] == EOS or len(document) == CONTEXT
        prompt_T = torch.tensor(document[:PROMPT])
        assert decode(model, prompt_T, CONTEXT - PROMPT, Sampling(0.0), eos=EOS).tokens == document[PROMPT:]
    short, _ = written_text(model, split, Writing("greedy", 300, CONTEXT - 8, WORDS), tmp_path, {"trunk": "x"}, CPU)
    assert max(map(len, documents(short))) == CONTEXT - 8 < model.context
    assert origin["trunk"] == "x" and origin["temperature"] == 0 and origin["prompt_tokens"] == PROMPT
    sampled, _ = written_text(model, split, Writing("sampled", 300, CONTEXT, WORDS), tmp_path, {"trunk": "x"}, CPU)
    assert documents(sampled) != documents(text)
    assert [each[:PROMPT] for each in documents(sampled)] == [each[:PROMPT] for each in documents(text)]


def test_what_is_written_stays_and_a_killed_run_goes_on(
    model: LanguageModel, split: TokenSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writing, "batch", 3)
    whole, origin = written_text(
        model, split, Writing("sampled", 400, CONTEXT, WORDS), tmp_path / "a", {"trunk": "x"}, CPU
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
        written_text(model, split, Writing("sampled", 400, CONTEXT, WORDS), tmp_path / "b", {"trunk": "x"}, CPU)
    resumed, again = written_text(
        model, split, Writing("sampled", 400, CONTEXT, WORDS), tmp_path / "b", {"trunk": "x"}, CPU
    )
    assert documents(resumed) == documents(whole) and origin == again
    calls = 10
    kept, _ = written_text(model, split, Writing("sampled", 400, CONTEXT, WORDS), tmp_path / "b", {"trunk": "x"}, CPU)
    assert calls == 10 and documents(kept) == documents(whole), "nothing is written twice"
    _, other = written_text(model, split, Writing("sampled", 400, CONTEXT, WORDS), tmp_path / "b", {"trunk": "y"}, CPU)
    assert calls > 10 and other["trunk"] == "y", "another model's text is another text"


def test_too_few_prompts_are_named(model: LanguageModel, split: TokenSplit, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.text=greedy: the corpus has prompts for .* data.states=90000"):
        written_text(model, split, Writing("greedy", 90_000, CONTEXT, WORDS), tmp_path, {}, CPU)


def test_a_sampling_model_begins_again_with_the_first_prompt(
    model: LanguageModel, split: TokenSplit, tmp_path: Path
) -> None:
    text, _ = written_text(model, split, Writing("sampled", 1500, CONTEXT, WORDS, "starts"), tmp_path, {}, CPU)
    written = [tuple(each) for each in documents(text) if set(each) != {EOS}]
    assert len(set(written)) > split.documents, "each prompt goes on in one way"
    with pytest.raises(ConfigError, match="data.text=greedy: the corpus has prompts for"):
        written_text(model, split, Writing("greedy", 1500, CONTEXT, WORDS, "starts"), tmp_path, {}, CPU)


@pytest.mark.parametrize("how", ["starts", "conversations"])
def test_only_what_the_model_writes_is_trained_on_and_no_row_cuts_it(
    how: str, model: LanguageModel, split: TokenSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writing, "batch", 3)
    answered = np.arange(len(split.tokens)) % 25 > 15
    corpus = replace(split, trained=answered)
    writing = Writing("greedy", 600, CONTEXT, WORDS, how)
    text, origin = written_text(model, corpus, writing, tmp_path, {"trunk": "x"}, CPU)
    assert text.trained is not None and len(text.trained) == len(text.tokens) and origin["prompts"] == how
    found = 0
    for begin, document in zip(text.offsets[:-1].tolist(), documents(text), strict=True):
        mark = text.trained[begin : begin + len(document)].tolist()
        if not any(mark):
            assert set(document) == {EOS}, "filler"
            continue
        found += 1
        assert begin // CONTEXT == (begin + len(document) - 1) // CONTEXT
        first = mark.index(True)
        prompt, answer = document[:first], document[first:]
        assert all(mark[first:]) and first <= CONTEXT * 3 // 4
        if how == "starts":
            assert len(prompt) == 33
        else:
            begins = [begin for begin in split.offsets if split.tokens[begin : begin + first].tolist() == prompt]
            assert any(answered[begin + first] and not answered[begin + first - 1] for begin in begins)
        longest = decode(model, torch.tensor(prompt), CONTEXT - first, Sampling(0.0), eos=writing.ends).tokens
        assert longest[: len(answer)] == answer and not set(answer[:-1]) & set(writing.ends)
    assert found > 9 and writing.ends == ([EOS] if how == "starts" else [EOS, 38])
    calls: list[int] = []
    monkeypatch.setattr(self_text, "decode_batch", lambda *a, **k: calls.append(1))
    fewer, _ = written_text(model, corpus, replace(writing, tokens=300), tmp_path, {"trunk": "x"}, CPU)
    assert not calls and 300 <= len(fewer.tokens) < len(text.tokens), "what is written serves those who want less"


def test_conversations_are_asked_of_a_corpus_that_has_some(
    model: LanguageModel, split: TokenSplit, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="data.prompts=conversations needs a corpus of conversations: type corpus=ch"):
        written_text(model, split, Writing("greedy", 90, CONTEXT, WORDS, "conversations"), tmp_path, {}, CPU)


def test_packing_loses_nothing_and_wastes_little() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 49, size=200)
    documents = np.repeat(np.arange(200), lengths)
    ids, sizes, trained = packed(documents, lengths, lengths // 2, 48, 999)
    assert sorted(ids[ids < 999]) == documents.tolist() and len(ids) % 48 == 0 and len(ids) < 1.1 * len(documents)
    ends = np.cumsum(sizes)
    for begin, end in zip(ends - sizes, ends, strict=True):
        assert len(set(ids[begin:end])) == 1 and begin // 48 == (end - 1) // 48
        kept = 0 if ids[begin] == 999 else end - begin - lengths[ids[begin]] // 2
        assert trained[begin:end].sum() == kept and (not kept or trained[end - kept : end].all())
