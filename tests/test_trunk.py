"""Trunks from a Hugging Face config: built, trained, decoded; what cannot be rolled back is refused."""

from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, Lfm2Config, MambaConfig, Qwen2Config

from cpdlm.bench.contenders import hugging_face
from cpdlm.config import ConfigError, resolve
from cpdlm.decoding import Sampling, decode
from cpdlm.model.build import build_language_model
from tests.test_language_model import T, V, rows

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FOREIGN = {
    "neox": GPTNeoXConfig(**SMALL, max_position_embeddings=64),
    "qwen": Qwen2Config(**SMALL, max_position_embeddings=64, num_key_value_heads=1),
}
STATES = {
    "mamba": MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4),
    "lfm2": Lfm2Config(**SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_trunk_from_a_hugging_face_config(name: str, tmp_path: Path) -> None:
    """It is built, trains, and its greedy text is that of transformers' generate on the same weights."""
    path = tmp_path / f"{name}.json"
    FOREIGN[name].to_json_file(path, use_diff=False)
    base = {"model.family": str(path), "data.context": 48, "decode.prompt_tokens": 4, "decode.new_tokens": 4}
    config = resolve(base | {"rank": 2, "horizon": 3, "link": "first"})
    assert config.run_name.startswith(f"code-{name}-own-r2")
    model = build_language_model(config, V).double().eval()
    assert model.trunk.width == 32 and len(model.trunk.layers()) == 2
    batch, ones = rows(), torch.ones(2, T, dtype=torch.float64)
    model(**batch, first_weight_BT=ones, rest_weight_BT=ones).loss.backward()
    assert all(parameter.grad is not None for parameter in model.trunk.layers()[0].parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    generate, prompt = hugging_face(model), torch.tensor([1, 2, 3])
    assert generate is not None
    assert decode(model, prompt, 40, Sampling(0.0)).tokens == generate(prompt, 40, Sampling(0.0), 0)


def test_a_config_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no such file; give a Hugging Face config.json, or one of llama"):
        resolve({"model.family": str(tmp_path / "no.json")})
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="other.json is not a Hugging Face config"):
        build_language_model(resolve({"model.family": str(tmp_path / "other.json")}), V)
    FOREIGN["qwen"].to_json_file(tmp_path / "qwen.json", use_diff=False)
    with pytest.raises(ConfigError, match="has a context of 64, data.context=256; lower data.context"):
        build_language_model(resolve({"model.family": str(tmp_path / "qwen.json")}), V)


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_cannot_be_rolled_back_is_refused(name: str, tmp_path: Path) -> None:
    STATES[name].to_json_file(tmp_path / "shape.json", use_diff=False)
    with pytest.raises(ConfigError, match="keeps a state that cannot be rolled back behind rejected drafts"):
        build_language_model(resolve({"model.family": str(tmp_path / "shape.json")}), V)
