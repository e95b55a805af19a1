"""A run's folder: whose it is, what in it is refused, full disks, and the weights that come back from it."""

import errno
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpdlm.files import WriteError
from cpdlm.training import checkpoints
from cpdlm.training.checkpoints import CHECKPOINT, WEIGHTS, RunError
from cpdlm.training.fit import Journal, fit
from tests.ragged import VOCAB, RaggedData
from tests.test_training import LAYOUTS, Killed, build, kill_at, settings, train


def killed_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        train(settings(), folder)
    return folder / CHECKPOINT


def test_a_checkpoint_that_is_damaged_foreign_or_of_other_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(why: str) -> None:
        with pytest.raises(RunError, match=f"{why}.*delete it to start again"):
            train(settings(), tmp_path)

    checkpoint = killed_run(tmp_path, monkeypatch)
    whole, content = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    for part in (whole[: len(whole) // 2], whole[:-1], b"", b"not a checkpoint"):
        checkpoint.write_bytes(part)
        refused("is truncated or not a checkpoint")
    for foreign in ({"weights": torch.zeros(2)}, torch.zeros(2), {"global_step": 3, "state_dict": {}}):
        torch.save(foreign, checkpoint)
        refused("is not a checkpoint of this program")
    weights, name = content["state_dict"], "model.heads.gate.weight"
    for damage, why in (
        ({"state_dict": weights | {name: weights[name].T}}, "does not fit this run .*size mismatch"),
        ({"state_dict": {key: weights[key] for key in weights if key != name}}, rf"lacks \['{name}'\]"),
        ({"loops": {}}, "does not fit this run"),
        ({"callbacks": {"Journal": {"summary": {"x": 1}, "step_ms": []}}}, "does not fit this run .*argument 'x'"),
    ):
        torch.save(content | damage, checkpoint)
        refused(why)


def test_what_else_fails_at_a_start_says_nothing_against_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*arguments: object) -> None:
        raise RuntimeError("all devices are busy")

    killed_run(tmp_path, monkeypatch)
    monkeypatch.setattr("cpdlm.training.module.MultiTokenModule.configure_optimizers", busy)
    with pytest.raises(RuntimeError, match="^all devices are busy"):
        train(settings(), tmp_path)


@pytest.mark.parametrize("here", [True, False])
def test_a_checkpoint_that_other_processes_do_not_see_is_refused(here: bool, tmp_path: Path) -> None:
    if here:
        (tmp_path / CHECKPOINT).touch()
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: {True: False, False: True}[decision])
    with pytest.raises(RunError, match="is there for some processes only: .*output=DIR"):
        Journal(settings(), tmp_path).setup(SimpleNamespace(strategy=strategy), None, "fit")  # type: ignore[arg-type]


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    checkpoints.open_run(tmp_path, settings())
    watched = {"decode.prompts": 3, "evaluate.rows": 5, "train.validate_every": 7, "name": "x"}
    checkpoints.open_run(tmp_path, settings(**watched))
    for more in ({"rank": 4}, {"optim.lr": 1.0}, {"seed": 3}, {"corpus": "text"}):
        with pytest.raises(RunError, match="holds another run .*give this one name=OTHER .*or delete the folder"):
            checkpoints.open_run(tmp_path, settings(**more))
    assert checkpoints.read_config(tmp_path).rank == 2


def test_two_runs_at_once_in_one_folder(tmp_path: Path) -> None:
    with checkpoints.exclusive(tmp_path / "run"):
        with (
            pytest.raises(RunError, match=rf"another run is writing to .*process {os.getpid()} on .*name=OTHER"),
            checkpoints.exclusive(tmp_path / "run"),
        ):
            pass
    with checkpoints.exclusive(tmp_path / "run"):  # given back
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(WriteError, match="cannot write .*output=DIR"),
        checkpoints.exclusive(tmp_path / "file" / "run"),
    ):
        pass

    def read_only(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", read_only)
        with pytest.raises(WriteError, match="cannot write .*Read-only file system.*output=DIR"):
            checkpoints.open_run(tmp_path, settings())


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = killed_run(tmp_path, monkeypatch)
    before = checkpoint.read_bytes()

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        with pytest.raises(WriteError, match="cannot write .*last.ckpt: No space left on device; .*free some space"):
            train(settings(), tmp_path)
    assert checkpoint.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".last.ckpt")], "a torn file is left"
    assert train(settings(), tmp_path)[0].resumed == 1


def test_a_disk_that_really_fills_up_is_named(tmp_path: Path) -> None:
    """A limit on file size makes the writes themselves fail, also those inside libraries."""
    config, folder = settings(), tmp_path
    model = build(config)
    checkpoints.open_run(folder, config)
    checkpoints.save_model(folder, model, model.state_dict(), VOCAB)
    before = (folder / WEIGHTS).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(WriteError, match=f"cannot write {folder / WEIGHTS}: .*free some space"):
            checkpoints.save_model(folder, model, model.state_dict(), VOCAB)
        with pytest.raises(WriteError, match=f"cannot write {folder / CHECKPOINT}: .*free some space"):
            fit(config, model, RaggedData(config), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "model.safetensors"]


# --- finished weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_comes_back_as_it_was_saved(layout: str, family: str, tmp_path: Path) -> None:
    config = settings(**LAYOUTS[layout], **{"model.family": family})
    model = build(config)
    if layout == "bias":
        assert model.heads is not None
        model.heads.balance_bias_R += torch.tensor([0.5, -0.5])
    checkpoints.open_run(tmp_path, config)
    checkpoints.save_model(tmp_path, model, model.state_dict(), VOCAB)
    again = checkpoints.load_model(tmp_path)
    assert not again.training and again.vocab_size == VOCAB
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.embeddings_are_tied == model.embeddings_are_tied


def test_weights_that_cannot_be_loaded_say_why(tmp_path: Path) -> None:
    config = settings()
    with pytest.raises(RunError, match="is not a run folder: it has no config.yaml"):
        checkpoints.load_model(tmp_path)
    checkpoints.open_run(tmp_path, config)
    with pytest.raises(RunError, match="has no finished model .*run its command again"):
        checkpoints.load_model(tmp_path)
    model = build(config)
    checkpoints.save_model(tmp_path, model, model.state_dict(), VOCAB)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for part in (whole[:-10], whole[:4], b""):
        (tmp_path / WEIGHTS).write_bytes(part)
        with pytest.raises(RunError, match="is truncated or not a safetensors file"):
            checkpoints.load_model(tmp_path)
    for name, theirs, saved, why in (
        ("separate", {}, LAYOUTS["separate"], "missing"),
        ("deeper", {}, {"rank": 4}, ""),
        ("untied", {"model.tie_embeddings": False}, {}, "missing .*unembedding"),
    ):
        checkpoints.open_run(tmp_path / name, settings(**theirs))
        made = build(settings(**saved))
        checkpoints.save_model(tmp_path / name, made, made.state_dict(), VOCAB)
        with pytest.raises(RunError, match=f"does not fit its config.*{why}"):
            checkpoints.load_model(tmp_path / name)


def test_a_config_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    for text in ("rank: [", "colour: red", "- a\n- b", "rank: 0"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(RunError, match="config.yaml cannot be read"):
            checkpoints.read_config(tmp_path)
