"""Released heads: found by name, whole or refused, on the very weights they were trained on."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_pretrained import SHAPES, V, saved, word_tokenizer
from transformers import PreTrainedTokenizerFast

from cpdlm import generate, released
from cpdlm.config import resolve
from cpdlm.data import checkpoints
from cpdlm.data.tokenizer import HubTokenizer
from cpdlm.decoding import Sampling, decode
from cpdlm.files import write_json
from cpdlm.model.language_model import build_language_model
from cpdlm.training import storage
from cpdlm.training.storage import RunError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of random heads on a small model that is called smollm2 here, and a package without released heads."""
    model_folder = saved(SHAPES["llama tied"], tmp_path / "model")
    letters = "".join(chr(40 + place) for place in range(V))
    PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(letters), eos_token="(").save_pretrained(model_folder)
    here = lambda name, cache="", bundle="": str(model_folder) if name == "smollm2" else name  # noqa: E731
    for module in (checkpoints, storage, released):
        monkeypatch.setattr(module, "checkpoint_folder", here)
    monkeypatch.setattr(released, "FOLDER", tmp_path / "released")
    folder = tmp_path / "run"
    config = resolve(
        {
            "rank": 2, "horizon": 3, "anchor": "token", "data.context": 48, "decode.prompt_tokens": 4, "decode.new_tokens": 4,
            "decode.shortlist": 20, "model.trunk": "smollm2", "model.family": "pretrained", "data.tokenizer": "model",
        }
    )  # fmt: skip
    storage.open_run(folder, config)
    trunk = storage.load_trunk(config)
    assert trunk is not None
    torch.manual_seed(3)
    model = build_language_model(config, trunk.vocab_size, trunk)
    storage.save_model(folder, model, model.state_dict(), trunk.vocab_size, torch.bfloat16)
    write_json(folder / "decode.json", {"shortlist": list(range(3, 23))})
    return folder


def test_released_heads_write_as_the_run_does(run: Path) -> None:
    path = released.release(run, "smollm2")
    assert path.parent == released.FOLDER and path.stat().st_size < 60_000, "heads alone"
    model, _ = released.load("smollm2")
    assert model.draft_ids is not None and model.draft_ids.tolist() == list(range(3, 23))
    theirs = storage.load_model(run)
    theirs.use_shortlist(torch.arange(3, 23))
    prompt_T = torch.tensor([5, 6])
    assert model.context == 64, "the model's own, not that of the rows that the heads were trained on"
    ours, other = (decode(each, prompt_T, 62, Sampling(0.0)) for each in (model, theirs))
    assert ours == other
    assert released.load("smollm2", shortlist=False)[0].draft_ids is None


def test_generate_takes_the_name(run: Path) -> None:
    released.release(run, "smollm2")
    out = io.StringIO()
    generate.run(generate.parser().parse_args(["--model", "smollm2", "--prompt", "b", "--max-new-tokens", "9"]), out)
    model, tokenizer = released.load("smollm2")
    assert isinstance(tokenizer, HubTokenizer)
    ids_T = torch.tensor([tokenizer.bos, *tokenizer.encode(["b"])[0]])
    done = decode(model, ids_T, 9, Sampling(0.0), eos=tokenizer.eos)
    assert out.getvalue() == tokenizer.decode(done.tokens) + "\n" and len(done.tokens) > 1


def test_without_heads_it_says_how_to_get_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--model", "smollm2", "--prompt", "ab"]) == 2
    assert (
        "no heads for smollm2 come with this package; train some: python experiments/run.py" in capsys.readouterr().err
    )


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
    assert released.main([str(run), "smollm2"]) == 2
    assert "has model.trunk=other, not smollm2" in capsys.readouterr().err
