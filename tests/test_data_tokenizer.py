"""Ids and back, and the bytes behind each id."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpdlm.config import ConfigError
from cpdlm.data import chat_template
from cpdlm.data.tokenizer import BpeTokenizer, BytesTokenizer, HubTokenizer, SavedTokenizer, build_tokenizer

TEXTS = [
    "def main(x):\n    return x + 1\n",
    "naïve café — 東京 \N{GRINNING FACE}\n",
    " leading space\t\ttabs\r\n",
    "a <|endoftext|> b",
]


def test_bytes_round_trip_non_utf8() -> None:
    tokenizer = BytesTokenizer()
    document = bytes(range(256)) + b"\xff\xfe caf\xe9"
    (ids,) = tokenizer.encode([document])
    assert bytes(ids.astype(np.uint8)) == document
    assert tokenizer.vocab_size == 257 and tokenizer.bos == tokenizer.eos == 256
    assert tokenizer.token_bytes()[ids].sum() == len(document)
    assert tokenizer.decode([256, *b"ok", 256]) == "ok"


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train("bpe:300", [text.encode() for text in TEXTS * 20])


def of_the_hub(bpe: BpeTokenizer, folder: Path, eos_token: str | None = "<|endoftext|>") -> Any:
    """The same as a tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    bpe.save(folder)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / BpeTokenizer.FILE), eos_token=eos_token)


def test_bpe_round_trip_and_bits_per_byte_accounting(bpe: BpeTokenizer) -> None:
    for text, ids in zip(TEXTS, bpe.encode(TEXTS), strict=True):
        assert bpe.decode([bpe.bos, *ids, bpe.eos]) == text
        # Every byte of the text belongs to exactly one token, else bits per byte would be off.
        assert bpe.token_bytes()[ids].sum() == len(text.encode())
        assert bpe.eos not in ids, "an end mark written in a document is text"
    assert bpe.vocab_size == 300 and bpe.eos == 299 and bpe.token_bytes()[299] == 0


def test_bpe_training_is_deterministic_and_saved(bpe: BpeTokenizer, tmp_path: Path) -> None:
    again = BpeTokenizer.train("bpe:300", [text.encode() for text in TEXTS * 20])
    bpe.save(tmp_path)
    saved = SavedTokenizer("bpe:300", 300, 299, 299, tmp_path, bpe.token_bytes())
    for ours, theirs, third in zip(bpe.encode(TEXTS), again.encode(TEXTS), saved.encode(TEXTS), strict=True):
        assert ours.tolist() == theirs.tolist() == third.tolist()


def test_non_utf8_needs_bytes(bpe: BpeTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"needs UTF-8 text.*caf.*type data.tokenizer=bytes"):
        bpe.encode([b"caf\xe9 au lait"])


def test_hub_tokenizer(bpe: BpeTokenizer, tmp_path: Path) -> None:
    model = of_the_hub(bpe, tmp_path)
    model.save_pretrained(tmp_path / "with")
    tokenizer = build_tokenizer(f"hf:{tmp_path / 'with'}", [])
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.bos == tokenizer.eos == tokenizer.vocab_size - 1
    of_the_hub(bpe, tmp_path, eos_token=None).save_pretrained(tmp_path / "without")
    with pytest.raises(ConfigError, match="has no end-of-sequence token"):
        build_tokenizer(f"hf:{tmp_path / 'without'}", [])


@pytest.mark.parametrize("kind", ["qwen2", "llama"])  # the library makes an empty one of the one, raises for the other
def test_a_model_without_a_tokenizer_is_told_apart(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(ConfigError, match="data.tokenizer=model.*or name it: data.tokenizer=hf:NAME"):
        HubTokenizer("model", tmp_path)


def test_a_prompt_begins_as_the_model_has_seen_texts_begin(bpe: BpeTokenizer, tmp_path: Path) -> None:
    """Ours: with bos. Hugging Face: as its own tokenizer writes a text, or, by its template, a user's turn."""
    from tokenizers.processors import TemplateProcessing

    bpe.save(tmp_path)
    saved = SavedTokenizer(bpe.name, 300, 299, 299, tmp_path, bpe.token_bytes())
    for ours in (BytesTokenizer(), bpe, saved):
        assert ours.prompt(TEXTS[0]) == ours.prompt(TEXTS[0].encode()) == [ours.bos, *ours.encode([TEXTS[0]])[0]]
        with pytest.raises(ConfigError, match=f"the tokenizer {ours.name} has no chat template.*leave --chat out"):
            ours.prompt(TEXTS[0], chat=True)
        with pytest.raises(ConfigError, match=f"the tokenizer {ours.name} has no chat template.*a corpus without"):
            ours.conversation([])
    for name, template in (("bare", None), ("begun", "<|endoftext|> $A")):
        model = of_the_hub(bpe, tmp_path)
        if template:
            model.backend_tokenizer.post_processor = TemplateProcessing(
                single=template, special_tokens=[("<|endoftext|>", 299)]
            )
            model.chat_template = (
                "{% for turn in messages %}{{ turn.role }}:{{ turn.content }};{% endfor %}"
                "{% if add_generation_prompt %}assistant:{% endif %}"
            )
        model.save_pretrained(tmp_path / name / "hf")
        kept = SavedTokenizer(f"hf:{name}", 300, 299, 299, tmp_path / name, bpe.token_bytes())
        for theirs in (build_tokenizer(f"hf:{tmp_path / name / 'hf'}", []), kept):
            for text in TEXTS:
                assert theirs.prompt(text) == model(text)["input_ids"]
            assert theirs.prompt("def")[0] == (299 if template else theirs.encode(["def"])[0][0])
            if template:
                assert theirs.prompt(b"def", chat=True) == theirs.encode(["user:def;assistant:"])[0].tolist()
            else:
                with pytest.raises(ConfigError, match="has no chat template"):
                    theirs.prompt("def", chat=True)


def test_of_a_conversation_only_the_answers_and_their_ends_are_marked(bpe: BpeTokenizer, tmp_path: Path) -> None:
    model = of_the_hub(bpe, tmp_path)
    turns = "{% for turn in messages %}{{ turn.role }}:{{ turn.content }}<|endoftext|>\n{% endfor %}"
    asked = "{% if add_generation_prompt %}assistant:{% endif %}"
    said = [("user", "def"), ("assistant", "return one"), ("user", "in"), ("assistant", "in x"), ("user", "more")]
    messages = [{"role": role, "content": content} for role, content in said]
    model.chat_template = turns + asked
    model.save_pretrained(tmp_path / "hf")
    theirs = build_tokenizer(f"hf:{tmp_path / 'hf'}", [])
    ids, answered = theirs.conversation(messages)
    expected = [
        ("user:def<|endoftext|>\nassistant:", False),
        ("return one<|endoftext|>", True),
        ("\nuser:in<|endoftext|>\nassistant:", False),
        ("in x<|endoftext|>", True),
        ("\n", False),
    ]
    pieces = [(model(text, add_special_tokens=False)["input_ids"], mark) for text, mark in expected]
    assert ids == [token for part, _ in pieces for token in part]
    assert answered == [mark for part, mark in pieces for _ in part]
    assert theirs.conversation(messages[:2])[0][: len(pieces[0][0])] == theirs.prompt("def", chat=True)
    model.chat_template = "{{ messages | length }}" + turns + asked
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigError, match="does not append an answer to its prompt .* give a corpus without"):
        build_tokenizer(f"hf:{tmp_path / 'hf'}", []).conversation(messages)


def test_an_answer_has_the_tokens_that_it_has_behind_its_prompt() -> None:
    """As with Llama 2, whose texts begin with a space that their later parts do not have."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=99, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator(["user assistant yes no"] * 5, trainer)
    model = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    model.chat_template = "{% for turn in messages %}{{ turn.content }}</s>{% endfor %}"
    messages = [{"role": "user", "content": "no"}, {"role": "assistant", "content": "yes"}]
    ids, answered = chat_template.conversation(model, "m", messages)
    assert ids == model("no</s>yes</s>")["input_ids"]
    assert model.convert_ids_to_tokens(model("yes</s>")["input_ids"])[0].startswith("\u2581")
    tokens = model.convert_ids_to_tokens([id for id, mark in zip(ids, answered, strict=True) if mark])
    assert "".join(tokens) == "yes</s>"


def test_a_chat_template_may_raise_and_need_not_end(
    bpe: BpeTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "TEMPLATE_SECONDS", 0.3)
    model = of_the_hub(bpe, tmp_path)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for template, why in (
        ("{{ raise_exception('no such role') }}", "TemplateError: no such role"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        (loop, "TimeoutError: it was not done after 0.3 s"),
    ):
        model.chat_template = template
        model.save_pretrained(tmp_path / "hf")
        theirs = build_tokenizer(f"hf:{tmp_path / 'hf'}", [])
        with pytest.raises(ConfigError, match=f"the chat template of .* cannot be used: {why}; leave --chat out"):
            theirs.prompt("def", chat=True)
