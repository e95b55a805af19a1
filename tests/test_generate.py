"""Text at the keyboard: what streams is the text, colours are the accepted drafts, and every mistake is named."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from cpdlm import cli, generate
from cpdlm.config import ConfigError
from cpdlm.data.tokenizer import BytesTokenizer
from cpdlm.decoding import Sampling, decode
from cpdlm.generate import GREEN, RESET, Incremental
from cpdlm.hf import CpdlmConfig, CpdlmForCausalLM, export
from cpdlm.hf import load as load_module
from cpdlm.hf.load import load
from cpdlm.training.checkpoints import load_model
from tests.made_runs import LISTED, bpe_run, listed_run, make_run

ROOT = Path(__file__).parents[1]
PROMPT = "def né("
IDS = torch.tensor([256, *PROMPT.encode()])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights, sharpened so that its text wanders and some drafts are right."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, {"rank": 1, "model.tie_embeddings": False}, measured=False)
    path = folder / "model.safetensors"
    state = load_file(path)
    state["unembedding.weight"] = state["unembedding.weight"] * 4
    save_file(state, path, {"vocab_size": "257"})
    return folder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(run: Path, *words: str, out: io.StringIO | None = None) -> str:
    out = io.StringIO() if out is None else out
    generate.run(cli.parse("generate", ["--model", str(run), *words]), out)
    return out.getvalue()


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.9, 40, 0.95)])
def test_the_stream_is_the_decoded_text(run: Path, sampling: Sampling) -> None:
    words = ["--temperature", str(sampling.temperature), "--top-k", str(sampling.top_k), "--top-p", str(sampling.top_p)]
    text = written(run, "--prompt", PROMPT, "--max-new-tokens", "40", "--seed", "5", *words)
    done = decode(load_model(run), IDS, 40, sampling, torch.Generator().manual_seed(5), eos=256)
    assert text == BytesTokenizer().decode(done.tokens) + "\n"


def test_an_exported_folder_writes_the_same(run: Path, tmp_path: Path) -> None:
    export.export(run, tmp_path / "mine")
    assert written(tmp_path / "mine", "--prompt", PROMPT) == written(run, "--prompt", PROMPT)


def test_an_ordinary_model_is_told_apart_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was taken for an export of a default shape: 6.5B parameters of random weights."""
    LlamaConfig(hidden_size=32).save_pretrained(tmp_path / "theirs")
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(CpdlmConfig, "build", None)
    for name in ("theirs", "model.gguf"):
        assert cli.main(["generate", "--model", str(tmp_path / name), "--prompt", "a"]) == 2
        assert f"make a folder that has them: cpdlm speed-up {tmp_path / name}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds a llama model without heads; .* cpdlm speed-up"):
        CpdlmForCausalLM.from_pretrained(tmp_path / "theirs")


def test_the_models_own_draft_vocabulary_is_used_unless_refused(tmp_path: Path) -> None:
    listed_run(tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "mine")
    for folder in (tmp_path / "run", tmp_path / "mine"):
        model = load(folder).model
        assert model.draft_ids is not None and model.draft_ids.tolist() == LISTED
        model = load(folder, draft_vocabulary=False).model
        assert model.draft_ids is None
        texts = [written(folder, "--prompt", PROMPT, *words) for words in ([], ["--draft-vocabulary", "none"])]
        assert texts[0] == texts[1]


def test_green_is_what_was_drafted_and_accepted(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    words = ["--prompt", "abc", "--max-new-tokens", "50", "--temperature", "0.7", "--show"]
    coloured = written(run, *words, out=Terminal())
    error = capsys.readouterr().err
    ids_T, generator = torch.tensor([256, *b"abc"]), torch.Generator().manual_seed(0)
    done = decode(load_model(run), ids_T, 50, Sampling(0.7), generator, eos=256)
    plain = written(run, *words)
    assert "\033" not in plain and GREEN in coloured
    controls = {ord(each) for each in coloured} & {*range(9), *range(11, 32)} - {27}
    assert not controls, "a terminal would obey them"
    assert len(coloured.replace(GREEN, "").replace(RESET, "")) == len(plain)
    # Colours by the definition: all but the last token of a pass, a character being its last byte's.
    expected = [index < count - 1 for count in done.emitted for index in range(count)]
    text = Incremental(BytesTokenizer().decode)
    pieces = [(text.push([token]), drafted) for token, drafted in zip(done.tokens, expected, strict=True)]
    assert len(re.findall(re.escape(GREEN), coloured)) == sum(drafted and piece != "" for piece, drafted in pieces) > 0
    assert f"{len(done.tokens)} tokens in {done.forwards} target forwards: " in error
    assert re.search(r"\d+ tokens/s; autoregressive decoding of the same prompt \d+ tokens/s: \d+\.\d\d x", error)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in written(run, *words, out=Terminal()) + capsys.readouterr().err


def test_characters_come_out_whole() -> None:
    tokenizer = BytesTokenizer()
    text = Incremental(tokenizer.decode)
    pieces = [text.push([byte]) for byte in "aé€😀b".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"] and text.end() == ""
    cut = Incremental(tokenizer.decode)
    assert cut.push(list("x€".encode())[:-1]) == "x" and cut.end() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("seed", range(20))
def test_pieces_joined_are_the_text(seed: int) -> None:
    """Bytes of every kind, cut anywhere: valid characters, stray bytes, special tokens."""
    generator = torch.Generator().manual_seed(seed)
    alphabet = [*"aé€😀".encode(), 0xFF, 0xC3, 0x80, 256, 65, 66]
    ids = [alphabet[each] for each in torch.randint(0, len(alphabet), (300,), generator=generator).tolist()]
    text, pieces, index = Incremental(BytesTokenizer().decode), [], 0
    while index < len(ids):
        size = int(torch.randint(1, 5, (), generator=generator))
        pieces.append(text.push(ids[index : index + size]))
        index += size
    assert "".join(pieces) + text.end() == BytesTokenizer().decode(ids)


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "empty prompt": (["--prompt", ""], "the prompt is empty; give --prompt TEXT"),
    "long prompt": (["--prompt", "x" * 64], "the prompt has 65 tokens with those that its tokenizer adds, the context"),
    "no room": (["--prompt", "x" * 50, "--max-new-tokens", "20"], "leaves room for 13 in the context of 64; give"),
    "temperature": (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must be a finite number of at least 0"),
    "seed": (["--prompt", "x", "--seed", str(2**70)], "must be a whole number between 0 and 9223372036854775807"),
    "chat": (["--prompt", "x", "--chat"], "the tokenizer bytes has no chat template"),
    "nothing": (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens=0 writes nothing; give a whole number"),
}


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert cli.main(["generate", *words]) == 2
    caught = capsys.readouterr()
    assert caught.out == "" and caught.err.startswith("error: ") and "Traceback" not in caught.err
    return caught.err


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_before_weights_are_read(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = MISTAKES[name]
    folder = tmp_path / "exported"
    export.export(run, folder)
    monkeypatch.setattr(load_module, "load_model", None)
    monkeypatch.setattr(CpdlmForCausalLM, "from_pretrained", None)
    assert message in fails(capsys, "--model", str(run), *words)
    assert message.replace("bytes", f"hf:{folder}") in fails(capsys, "--model", str(folder), *words)


def test_a_folder_that_cannot_be_used_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(folder: Path) -> str:
        return fails(capsys, "--model", str(folder), "--prompt", "x")

    assert "is neither a run's folder (no config.yaml) nor an exported model" in error(tmp_path / "nowhere")
    folder = tmp_path / "mine"
    export.export(run, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cannot be loaded" in error(folder)
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded" in error(folder)
    (folder / "tokenizer_config.json").unlink()
    assert f"{folder} has no tokenizer (tokenizer_config.json); export it again" in error(folder)
    bpe = bpe_run(tmp_path)
    export.export(run, tmp_path / "other")
    export.export(bpe, tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / name).replace(tmp_path / "other" / name)
    assert "the weights 257; they do not belong together" in error(tmp_path / "other")


@pytest.mark.parametrize("given", [b"", b"\n", b"\r\n"])
def test_nothing_on_standard_input_is_an_empty_prompt(
    given: bytes, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert "the prompt is empty" in fails(capsys, "--model", str(run))


def test_standard_input_may_be_any_bytes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n")))
    done = decode(load_model(run), torch.tensor([256, 0xFF, 0xFE]), 4, Sampling(0.0), eos=256)
    assert written(run, "--max-new-tokens", "4") == BytesTokenizer().decode(done.tokens) + "\n"
