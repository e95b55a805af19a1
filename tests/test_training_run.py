"""The life of a run as the library offers it: trains without the suite, resumes, and refuses what does not fit."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cpdlm.config import Config, ConfigError, resolve
from cpdlm.model.language_model import LanguageModel
from cpdlm.training import checkpoints
from cpdlm.training.checkpoints import RunError
from cpdlm.training.module import MultiTokenModule
from cpdlm.training.run import train

PLAIN: dict[str, Any] = {"horizon": 1, "rank": 1, "balance": "none", "name": "trunk"}


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.py").write_text("".join(f"def f_{number}_{line}(x):\n    return x\n" for line in range(8)))
    return {
        "size": "micro",
        "rank": 2,
        "horizon": 3,
        "corpus": str(corpus),
        "data.cache": str(tmp_path / "cache"),
        "output": str(tmp_path / "runs"),
        "data.context": 48,
        "data.batch_rows": 4,
        "decode.prompt_tokens": 4,
        "decode.new_tokens": 4,
        "optim.steps": 4,
        "optim.warmup": 1,
        "train.validate_every": 2,
        "train.validation_rows": 4,
        "train.checkpoint_every": 2,
        "data.workers": 0,
    }


def heads(base: dict[str, Any], **more: Any) -> Config:
    return resolve(base | {"model.trunk": str(Path(base["output"]) / "trunk"), "name": "heads"} | more)


def quiet(line: str) -> None:
    pass


def test_heads_train_on_a_models_own_text_without_the_suite(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a trunk's states, its text and a part of its vocabulary; killed and resumed; and nothing is done twice."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("experiments", "mlflow")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("experiments", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    trunk = train(resolve(base | PLAIN), say=quiet)
    config = heads(
        base, **{"data.text": "sampled", "data.prompts": "starts", "data.states": 960, "loss.draft_vocabulary": 64}
    )
    original, lines, watched = MultiTokenModule.training_step, list[str](), list[int]()

    def dying(self: MultiTokenModule, batch: Any, batch_index: int) -> torch.Tensor:
        if self.global_step == 3:
            raise KeyError("killed")
        return original(self, batch, batch_index)

    def watch(model: LanguageModel) -> dict[str, float]:
        watched.append(model.rank)
        return {"rank": 2.0}

    monkeypatch.setattr(MultiTokenModule, "training_step", dying)
    with pytest.raises(KeyError, match="killed"):
        train(config, say=lines.append)
    assert any("writes 960 tokens" in line for line in lines) and any("hidden states of" in line for line in lines)
    monkeypatch.setattr(MultiTokenModule, "training_step", original)
    lines.clear()
    folder = train(config, watch=watch, say=lines.append)
    assert [line for line in lines if "cover" not in line] == [], "text and states are there already"
    assert folder == Path(base["output"]) / "heads" and watched == [2]
    assert '"resumed": 1' in (folder / checkpoints.TRAINED).read_text()
    model = checkpoints.load_model(folder)
    assert model.frozen_target and model.vocab_size == checkpoints.load_model(trunk).vocab_size
    before = (folder / checkpoints.WEIGHTS).stat().st_mtime_ns
    shutil.rmtree(folder / checkpoints.TOKENIZER)
    assert train(config, say=quiet) == folder and checkpoints.has_tokenizer(folder), "what is lost comes back"
    monkeypatch.setattr("cpdlm.training.run.load_corpus", None)  # a finished run needs no text
    assert train(config) == folder and (folder / checkpoints.WEIGHTS).stat().st_mtime_ns == before


def test_a_trunk_whose_tokens_mean_something_else_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    """Each corpus trains a BPE of its own: as many ids, of other tokens."""
    base |= {"data.tokenizer": "bpe:270"}
    train(resolve(base | PLAIN), say=quiet)
    (tmp_path / "texts").mkdir()
    for index in range(40):
        (tmp_path / "texts" / f"{index}.py").write_text(f"lorem{index} = ipsum\n" * (20 + index))
    with pytest.raises(RunError, match="has another vocabulary .* use the trunk's own data settings"):
        train(heads(base, corpus=str(tmp_path / "texts")), say=quiet)


def test_text_that_a_model_wrote_otherwise_since_is_refused(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(resolve(base | PLAIN), say=quiet)
    own = heads(base, **{"data.text": "sampled", "data.states": 480})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cpdlm.training.run.fit", _interrupted)
        train(own, say=quiet)
    shutil.rmtree(Path(base["data.cache"]) / "written")
    monkeypatch.setattr("cpdlm.training.self_text.SEED", 1)  # as another machine rounds
    with pytest.raises(RunError, match="heads was trained on other text"):
        train(own, say=quiet)


def _interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_what_does_not_fit_is_refused_before_any_step(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs a launcher: torchrun --nproc-per-node=2"):
        train(resolve(base | {"devices": 2}))
    with checkpoints.exclusive(Path(base["output"]) / "trunk"), pytest.raises(RunError):
        train(resolve(base | PLAIN))
    trunk = train(resolve(base | PLAIN), say=quiet)
    with pytest.raises(RunError, match="holds another run"):
        train(resolve(base | PLAIN | {"seed": 1}))
    with pytest.raises(RunError, match="has data.context=48; lower data.context=64"):
        train(heads(base, **{"data.context": 64}))
    with pytest.raises(RunError, match="was trained with data.release=0, and has read test text of data.release=1"):
        train(heads(base, **{"data.release": 1}))
    with pytest.raises(RunError, match="is not a run folder"):
        train(heads(base, **{"model.trunk": base["corpus"]}))
    with pytest.raises(ConfigError, match="decode.prompts=99999"):
        train(heads(base, **{"decode.prompts": 99999}))
    for rank in (10**6, 2 * 10**9):
        with pytest.raises(ConfigError, match=f"rank={rank} horizon=3: heads of .* take .* to train, and .* are free"):
            train(heads(base, rank=rank))
    assert not (Path(base["output"]) / "heads" / checkpoints.CONFIG).exists()
    # A checkpoint holds neither text nor frozen weights: a run that began with others must not go on.
    (trunk / checkpoints.TRAINED).unlink()
    (Path(base["corpus"]) / "0.py").write_text("pass\n" * 40)
    with pytest.raises(RunError, match="trained on other text: the corpus has changed since"):
        train(resolve(base | PLAIN))
