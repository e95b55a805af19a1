"""Adapters for the draft: the target stays what it was, caches roll back, only adapters and heads train and are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pretrained import CONTEXT, SHAPES, V, saved, with_heads
from tiny import TINY, TINY_RETROFIT, small_pretrained
from transformers import AutoModelForCausalLM

from cpdlm.bench.compare import Protocol, measure
from cpdlm.config import ConfigError, resolve
from cpdlm.decoding import CapturedForwards, Captures, Options, Sampling, decode, decode_batch
from cpdlm.hf import export
from cpdlm.model.adapters import is_adapter
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.pretrained import load_pretrained
from cpdlm.training import checkpoints
from cpdlm.training.checkpoints import RunError
from experiments import run
from experiments.records import load
from experiments.suite import words as typed

pytest.importorskip("peft")
TAKEN = [name for name in SHAPES if not name.startswith(("gpt2", "opt"))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: saved(shape, tmp_path_factory.mktemp("model")) for name, shape in SHAPES.items()}


def adapted(folder: Path, dtype: torch.dtype = torch.float32, *, moved: bool = True, **more: object) -> LanguageModel:
    """moved: with adapters that do something."""
    model = with_heads(
        load_pretrained(str(folder), dtype, CONTEXT), **{"model.adapter_layers": 1, "anchor": "token"} | more
    )
    if moved:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_adapter(name):
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_target_is_the_trunks_own_and_the_draft_begins_there(
    name: str, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    tokens_BT = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(3))
    fresh, moved = adapted(folders[name], dtype, moved=False), adapted(folders[name], dtype)
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
def test_greedy_text_is_that_of_generate_and_caches_roll_back(name: str, folders: dict[str, Path]) -> None:
    model = adapted(folders[name])
    whole = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    prompts = [torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(length)) for length in (3, 9, 6)]
    for prompt_T, row in zip(prompts, decode_batch(model, prompts, 24, Sampling(0.0)), strict=True):
        theirs = whole.generate(
            prompt_T[None],
            attention_mask=torch.ones_like(prompt_T[None]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )[0, len(prompt_T) :].tolist()
        assert row.tokens == theirs
        for sampling in (Sampling(0.0), Sampling()):
            # The very drafts, too: a draft's state that a rollback spoilt would be another draft.
            with_cache, without = (
                decode(model, prompt_T, 24, sampling, torch.Generator().manual_seed(0), options=Options(use_cache=use))
                for use in (True, False)
            )
            assert with_cache == without


def test_the_second_run_is_timed_and_forwards_count_once(folders: dict[str, Path]) -> None:
    model = adapted(folders["llama tied"])
    found = measure({"one": model}, torch.arange(3, 11).view(2, 4), Sampling(0.0), Protocol(8, repeats=1, warmups=0))
    assert found["one"]["tokens"] == 16 and found["one"]["passes"] <= 16


def test_captured_forwards_are_not_for_adapters(folders: dict[str, Path]) -> None:
    model = adapted(folders["qwen2"])
    assert Captures(model, on="cpu")(1, 20, Sampling(0.0)) is None
    with pytest.raises(ValueError, match="adapters for the draft keep a second cache"):
        CapturedForwards(model, 1, Sampling(0.0), slots=20)


def test_only_adapters_and_heads_train_and_are_stored(folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(folders["llama tied"], moved=False).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"heads", "anchor", "draft_trunk"}
    assert all(is_adapter(name) for name in trained if name.startswith("draft_trunk."))
    counts = model.parameter_counts()
    assert (
        counts["trained"] == counts["heads"] + counts["gate"] + counts["anchor"] + counts["adapters"] > counts["heads"]
    )
    tokens_BT = torch.randint(0, V, (2, 12))
    terms = model(
        tokens_BT,
        torch.arange(12).expand(2, 12),
        torch.randint(0, V, (2, 12, 4)),
        torch.full((2, 12), 4),
        torch.zeros(2, 12),
        torch.ones(2, 12),
        objective=("eq14", 0.9, 1.0),
    )
    terms.loss.backward()
    moving = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert any(is_adapter(name) for name in moving) and moving <= trained
    config = resolve(
        {
            "rank": 3,
            "horizon": 4,
            "anchor": "token",
            "data.context": CONTEXT,
            "decode.prompt_tokens": 4,
            "decode.new_tokens": 4,
            "model.trunk": str(folders["llama tied"]),
            "model.family": "pretrained",
            "data.tokenizer": "model",
            "model.adapter_layers": 1,
        }
    )
    model = adapted(folders["llama tied"])
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
    for number in range(60):
        (tmp_path / "text" / f"{number}.py").write_text(
            "".join(f"def f_{number}_{n}(x):\n    return x * {n}\n" for n in range(24))
        )
    small_pretrained(tmp_path / "model", sorted((tmp_path / "text").iterdir()))
    settings = (
        TINY
        | TINY_RETROFIT
        | {"rank": 2, "anchor": "token", "model.adapter_layers": 1, "model.dtype": "bfloat16", "name": "one"}
    )
    words = typed(settings)
    words += [
        f"corpus={tmp_path}/text",
        f"model={tmp_path}/model",
        f"output={tmp_path}/runs",
        f"data.cache={tmp_path}/cache",
    ]
    assert run.main(words) == 0
    record = load(tmp_path / "runs" / "one" / "one.json")
    assert record.variant == "token-conditioned, adapters 1" and record["parameters"]["adapters"] > 0
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
    name: str, layers: int, message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(folders[name], **{"model.adapter_layers": layers})
