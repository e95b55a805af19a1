"""Adapters for the draft: the target stays what it was, caches roll back, adapters and heads train and are stored."""

from pathlib import Path

import pytest
import torch
from made_pretrained import SHAPES, V, continued, loaded, prompts, settings, with_heads
from safetensors.torch import load_file
from tiny import TINY, TINY_RETROFIT, code_folder, small_pretrained
from transformers import AutoModelForCausalLM

from cpdlm.bench.compare import Protocol, measure
from cpdlm.config import ConfigError, resolve
from cpdlm.decoding import CapturedForwards, Captures, Options, Sampling, decode, decode_batch
from cpdlm.hf import export
from cpdlm.model.adapters import is_adapter
from cpdlm.model.build import parameter_counts
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.losses.draft import Objective
from cpdlm.training import checkpoints
from cpdlm.training.checkpoints import RunError
from experiments import run
from experiments.records import load
from experiments.suite import words as typed

pytest.importorskip("peft")
TAKEN = [name for name in SHAPES if not name.startswith(("gpt2", "opt"))]


def adapted(folder: Path, dtype: torch.dtype = torch.float32, *, moved: bool = True, **more: object) -> LanguageModel:
    """moved: with adapters that do something."""
    model = with_heads(loaded(folder, dtype), **{"model.adapter_layers": 1, "link": "first"} | more)
    if moved:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_adapter(name):
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_target_is_the_trunks_own_and_the_draft_begins_there(
    name: str, dtype: torch.dtype, pretrained: dict[str, Path]
) -> None:
    tokens_BT = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(3))
    fresh, moved = adapted(pretrained[name], dtype, moved=False), adapted(pretrained[name], dtype)
    with torch.inference_mode():
        target_BTD = fresh.trunk(tokens_BT)
        both_BTD = fresh.hidden(tokens_BT)
        near = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(both_BTD[..., :32], target_BTD, rtol=0, atol=0)
        torch.testing.assert_close(both_BTD[..., 32:], target_BTD, rtol=near, atol=near * float(target_BTD.abs().max()))
        hidden_BTD = moved.hidden(tokens_BT)
        assert torch.equal(hidden_BTD[..., :32], target_BTD) and not torch.equal(
            hidden_BTD[..., 32:], both_BTD[..., 32:]
        )
        assert torch.equal(moved.target_log_probs(hidden_BTD), fresh.target_log_probs(both_BTD))
        ours, theirs = (
            each.draft_joint(states_BTD[:, -1], tokens_BT[:, -1]).log_factors_NRV
            for each, states_BTD in ((moved, hidden_BTD), (fresh, both_BTD))
        )
        assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("name", TAKEN)
def test_greedy_text_is_that_of_generate_and_caches_roll_back(name: str, pretrained: dict[str, Path]) -> None:
    model = adapted(pretrained[name])
    whole = AutoModelForCausalLM.from_pretrained(pretrained[name]).eval()
    asked = prompts(3, 9, 6)
    for prompt_T, row in zip(asked, decode_batch(model, asked, 24, Sampling(0.0)), strict=True):
        assert row.tokens == continued(whole, prompt_T, 24)
        for sampling in (Sampling(0.0), Sampling()):
            # The very drafts, too: a draft's state that a rollback spoilt would be another draft.
            with_cache, without = (
                decode(model, prompt_T, 24, sampling, torch.Generator().manual_seed(0), options=Options(use_cache=use))
                for use in (True, False)
            )
            assert with_cache == without


def test_the_second_run_is_timed_and_forwards_count_once(pretrained: dict[str, Path]) -> None:
    model = adapted(pretrained["llama tied"])
    found = measure({"one": model}, torch.arange(3, 11).view(2, 4), Sampling(0.0), Protocol(8, repeats=1, warmups=0))
    assert found["one"]["tokens"] == 16 and found["one"]["passes"] <= 16


def test_captured_forwards_are_not_for_adapters(pretrained: dict[str, Path]) -> None:
    model = adapted(pretrained["qwen2"])
    assert Captures(model, on="cpu")(1, 20, Sampling(0.0)) is None
    with pytest.raises(ValueError, match="adapters for the draft keep a second cache"):
        CapturedForwards(model, 1, Sampling(0.0), slots=20)


def test_only_adapters_and_heads_train_and_are_stored(pretrained: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(pretrained["llama tied"], moved=False).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"heads", "anchor", "draft_trunk"}
    assert all(is_adapter(name) for name in trained if name.startswith("draft_trunk."))
    counts = parameter_counts(model)
    assert (
        counts["trained"] == counts["heads"] + counts["gate"] + counts["anchor"] + counts["adapters"] > counts["heads"]
    )
    tokens_BT, future_BTN = torch.randint(0, V, (2, 12)), torch.randint(0, V, (2, 12, 4))
    indices_BT, successors_BT = torch.arange(12).expand(2, 12), torch.full((2, 12), 4)
    weights = torch.zeros(2, 12), torch.ones(2, 12)
    terms = model(tokens_BT, indices_BT, future_BTN, successors_BT, *weights, objective=Objective("eq14"))
    terms.loss.backward()
    moving = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert any(is_adapter(name) for name in moving) and moving <= trained
    config = resolve(settings(str(pretrained["llama tied"]), link="first", **{"model.adapter_layers": 1}))
    model = adapted(pretrained["llama tied"])
    checkpoints.open_run(tmp_path, config)
    checkpoints.save_model(tmp_path, model, model.state_dict(), V)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"heads", "anchor", "draft_trunk"}
    assert all(is_adapter(name) for name in stored if name.startswith("draft_trunk."))
    loaded = checkpoints.load_model(tmp_path)
    prompt_T = torch.tensor([5, 6, 7])
    assert decode(loaded, prompt_T, 24, Sampling(0.0)) == decode(model, prompt_T, 24, Sampling(0.0))
    with pytest.raises(RunError, match=r"model.adapter_layers\), which an exported folder cannot hold"):
        export.export(tmp_path, tmp_path / "mine")


def test_a_cell_with_adapters_runs_to_a_valid_record(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    small_pretrained(tmp_path / "model", sorted(code_folder(tmp_path / "text").iterdir()))
    words = typed(TINY | TINY_RETROFIT | {"rank": 2, "link": "first", "model.adapter_layers": 1, "name": "one"})
    words += ["model.dtype=bfloat16", f"corpus={tmp_path}/text", f"model={tmp_path}/model"]
    words += [f"output={tmp_path}/runs", f"data.cache={tmp_path}/cache"]
    assert run.main(words) == 0
    record = load(tmp_path / "runs" / "one" / "one.json")
    assert record.variant == "token-conditioned, draft 4, adapters 1" and record["parameters"]["adapters"] > 0
    assert record["training"]["curve"][-1]["validation/greedy_tokens_per_pass"] >= 1
    assert record["decoding"]["modes"]["greedy"]["tokens"] == 2 * 8
    assert not (tmp_path / "cache" / "states").exists(), "its states change with every step"


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("gpt2", 1, "cannot be run by themselves; type 0|no linear maps to adapt"),
        ("llama tied", 3, "LlamaModel has 2 layers in a row; give fewer, or 0"),
        ("opt, which makes its own masks", 1, "OPTModel has 0 layers in a row"),
    ],
)
def test_trunks_that_cannot_have_adapters_are_named(
    name: str, layers: int, message: str, pretrained: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(pretrained[name], **{"model.adapter_layers": layers})
