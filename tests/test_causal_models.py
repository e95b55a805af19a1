"""The architectures of the installed transformers, as tests/causal_models.json has them."""

import json

import pytest

from tests.causal_models import LIST, outcomes


@pytest.mark.slow
def test_every_causal_model_decodes_as_its_own_generate_or_is_refused() -> None:
    """Another release of transformers shows here what it changed; `python -m tests.causal_models` writes the list."""
    listed = json.loads(LIST.read_text())["models"]
    found = outcomes()
    changed = {
        kind: (listed.get(kind, "unknown"), found.get(kind, "gone"))
        for kind in sorted(listed.keys() | found.keys())
        if listed.get(kind) != found.get(kind)
    }
    assert not changed, json.dumps(changed, indent=1)
    assert not [kind for kind, said in found.items() if said.startswith("differs")]
