"""Released heads: found by name, whole or refused, on the very weights they were trained on."""

import io
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from made_pretrained import SHAPES, V, saved, settings, word_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from cpdlm import cli, generate
from cpdlm.config import resolve
from cpdlm.data import pretrained_files, target
from cpdlm.decoding import Sampling, decode
from cpdlm.hf import export, released
from cpdlm.hf.load import load
from cpdlm.model.build import build_language_model
from cpdlm.training import checkpoints
from cpdlm.training.checkpoints import RunError

CHECKPOINT_FOLDER = pretrained_files.checkpoint_folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of random heads on a small model that is called smollm2 here, and a package without released heads."""
    model_folder = saved(SHAPES["llama untied"], tmp_path / "model")
    letters = "".join(chr(40 + place) for place in range(V))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(letters), eos_token="(")
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}e"
    tokenizer.backend_tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.save_pretrained(model_folder)
    here = lambda name, cache="", bundle="": str(model_folder) if name == "smollm2" else name  # noqa: E731
    for module in (pretrained_files, target):
        monkeypatch.setattr(module, "checkpoint_folder", here)
    monkeypatch.setattr(released, "FOLDER", tmp_path / "released")
    folder = tmp_path / "run"
    more = {"rank": 2, "horizon": 3, "decode.draft_vocabulary": 20, "output": str(tmp_path / "elsewhere")}
    config = resolve(settings("smollm2", link="first") | more)
    checkpoints.open_run(folder, config)
    trunk = checkpoints.load_target(config)
    assert trunk is not None
    torch.manual_seed(3)
    model = build_language_model(config, trunk.vocab_size, trunk)
    checkpoints.save_model(folder, model, model.state_dict(), trunk.vocab_size, torch.bfloat16)
    checkpoints.save_draft_vocabulary(folder, config, torch.arange(3, 23))
    return folder


def test_released_heads_write_as_the_run_does(run: Path) -> None:
    path = released.release(run, "smollm2")
    assert path.parent == released.FOLDER and path.stat().st_size < 60_000, "heads alone"
    assert b"elsewhere" not in path.read_bytes(), "nothing of the folder that it was trained in"
    model = released.load("smollm2", dtype="float32")
    assert model.draft_ids is not None and model.draft_ids.tolist() == list(range(3, 23))
    theirs = checkpoints.load_model(run)
    theirs.use_draft_vocabulary(torch.arange(3, 23))
    prompt_T = torch.tensor([5, 6])
    assert model.context == 64, "the model's own, not that of the rows that the heads were trained on"
    ours, other = (decode(each, prompt_T, 62, Sampling(0.0)) for each in (model, theirs))
    assert ours == other
    assert released.load("smollm2", draft_vocabulary=False).draft_ids is None


def test_a_model_whose_heads_are_released_is_not_probed_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released.release(run, "smollm2")
    monkeypatch.setattr("cpdlm.model.pretrained._probe", None)
    assert released.load("smollm2").rank == 2
    with pytest.raises(TypeError):
        checkpoints.load_model(run)


def test_heads_for_a_kind_of_text_have_a_name_of_their_own(run: Path) -> None:
    assert not released.is_name(Path("smollm2-chat"))
    assert released.release(run, "smollm2-chat").name == "smollm2-chat.safetensors"
    assert released.is_name(Path("smollm2-chat")) and released.load("smollm2-chat").rank == 2
    with pytest.raises(RunError, match="no heads for smollm2 come"):
        released.load("smollm2")
    with pytest.raises(RunError, match="not smollm3"):
        released.release(run, "smollm3")


def test_bfloat16_is_widened_where_it_would_be_emulated(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("dtype: float32", "dtype: bfloat16"))
    released.release(run, "smollm2")
    assert released.load("smollm2").trunk.embedding.dtype == torch.bfloat16
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("cpdlm.hf.load.multiplies_bfloat16", lambda native=native: native)
        assert load(Path("smollm2"), widen=True).model.trunk.embedding.dtype == dtype


def written(model: str | Path, *words: str) -> str:
    out = io.StringIO()
    generate.run(cli.parse("generate", ["--model", str(model), "--max-new-tokens", "12", *words]), out)
    return out.getvalue()


def test_the_name_becomes_a_folder_that_stands_alone(run: Path, tmp_path: Path) -> None:
    """Loaded by transformers it writes what the command writes, after the same prompt, and its card says what it is."""
    released.release(run, "smollm2")
    folder = tmp_path / "fast"
    assert cli.main(["export", "smollm2", str(folder)]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.model.draft_ids.tolist() == list(range(3, 23))
    turn = [{"role": "user", "content": "bc"}]
    for words, text in (
        ([], tokenizer("bc", return_tensors="pt")),
        (["--chat"], tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")),
    ):
        text = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
        new_T = model.generate(**text, max_new_tokens=12)[0, text["input_ids"].shape[1] :]
        assert text["input_ids"].tolist() == [[58, 59, 61][: 2 + len(words)]]
        for each in ("smollm2", folder):
            assert written(each, "--prompt", "bc", *words) == tokenizer.decode(new_T, skip_special_tokens=True) + "\n"
    front = metadata_load(folder / "README.md") or {}
    assert (front["base_model"], front["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert "cpdlm export smollm2 fast" in (folder / "README.md").read_text()


def test_every_stop_of_the_model_stops_its_heads(run: Path, tmp_path: Path) -> None:
    """Where the model's own `generate` stops: by name, in the exported folder, and by `generate` on that."""
    released.release(run, "smollm2")
    base = Path(pretrained_files.checkpoint_folder("smollm2", ""))
    said = released_text()
    assert len({*said[:5]}) > 2
    ends = [66, said[4]]
    GenerationConfig(eos_token_id=ends, pad_token_id=66).save_pretrained(base)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    theirs_T = plain.generate(**tokenizer("bc", return_tensors="pt"), max_new_tokens=12)[0, 2:]
    stopped = said[: said.index(said[4]) + 1]
    assert theirs_T.tolist() == stopped and len(stopped) < 12
    folder = tmp_path / "fast"
    export.export(Path("smollm2"), folder)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends
    for each in ("smollm2", folder):
        assert written(each, "--prompt", "bc") == tokenizer.decode(theirs_T, skip_special_tokens=True) + "\n"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.generate(torch.tensor([[58, 59]]), max_new_tokens=12)[0, 2:].tolist() == stopped


def released_text() -> list[int]:
    """Of the released model, with nothing that stops it."""
    return decode(released.load("smollm2"), torch.tensor([58, 59]), 12, Sampling(0.0)).tokens


def test_a_damaged_file_and_other_weights_are_refused(run: Path) -> None:
    path = released.release(run, "smollm2")
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(RunError, match="is damaged"):
        released.load("smollm2")
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    tensors = load_file(path)
    save_file(tensors, path, facts | {"trunk_sha256": '"0"'})
    with pytest.raises(RunError, match="trained on other weights of smollm2"):
        released.load("smollm2")
    tensors.pop("heads.gate.weight")
    save_file(tensors, path, facts)
    with pytest.raises(RunError, match=r"does not fit its settings: missing \['heads.gate.weight'\]"):
        released.load("smollm2")


def test_only_runs_on_that_model_are_released(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("trunk: smollm2", "trunk: other"))
    assert cli.main(["release", str(run), "smollm2"]) == 2
    assert "has model.trunk=other, not smollm2" in capsys.readouterr().err
