"""Other people's tools on an exported folder: `transformers serve` and `chat`, with drafts, and `lm_eval`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cpdlm.hf.generate
from cpdlm.files import write_json
from cpdlm.hf.export import export
from cpdlm.text import load_model
from tests.made_runs import make_run

TURN, NEW_TOKENS = "def f1(", 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a chat template that is the user's words, and drafts from the text, which come true without training."""
    make_run(tmp_path / "run", {"horizon": 3, "model.tie_first": True}, measured=False)
    wrapped = export(tmp_path / "run", tmp_path / "served")
    wrapped.config.draft = "lookup"
    wrapped.config.save_pretrained(tmp_path / "served")
    settings = tmp_path / "served" / "tokenizer_config.json"
    write_json(settings, json.loads(settings.read_text()) | {"chat_template": "{{ messages[-1]['content'] }}"})
    return tmp_path / "served"


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = Serve(str(folder), trust_remote_code=True, device="cpu", port=port, non_blocking=True)
    url = f"http://localhost:{port}"
    try:
        while not running.server.started:
            time.sleep(0.1)
        yield url
    finally:
        running.kill_server()


@pytest.mark.slow  # half a minute: a server and a client start
def test_a_served_model_writes_what_generate_writes_and_drafts(
    folder: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    decode_batch = cpdlm.hf.generate.decode_batch

    def spy(*arguments: Any, **options: Any) -> Any:
        done = decode_batch(*arguments, **options)
        seen.extend((len(each.tokens), each.forwards) for each in done)
        return done

    monkeypatch.setattr(cpdlm.hf.generate, "decode_batch", spy)
    text = load_model(folder).generate(TURN, NEW_TOKENS)
    asked = {"model": str(folder), "messages": [{"role": "user", "content": TURN}], "max_tokens": NEW_TOKENS}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        json.dumps(asked | {"temperature": 0.0, "stream": False}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"] == text
    chat = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(folder), server]
    done = subprocess.run(
        [*chat, "do_sample=False", f"max_new_tokens={NEW_TOKENS}"],
        input=f"{TURN}\n!exit\n",
        env=os.environ | {"COLUMNS": "200", "HF_HUB_OFFLINE": "0"},
        text=True,
        capture_output=True,
    )
    assert text in done.stdout, done.stdout + done.stderr
    assert len(seen) == 2 and all(forwards < tokens for tokens, forwards in seen), seen


def test_lm_eval_reads_the_probabilities_of_the_model_and_the_text_of_generate(folder: Path) -> None:
    """As the command loads it (trust_remote_code=True), and after `import cpdlm.hf` without that trust."""
    models, api = pytest.importorskip("lm_eval.models.huggingface"), pytest.importorskip("lm_eval.api.instance")
    ours = load_model(folder)
    model, continuation, text = ours.loaded.model, "x + 1", ours.generate(TURN, NEW_TOKENS)
    ids, prompt = (ours.loaded.tokenizer.prompt(each, False) for each in (TURN + continuation, TURN))
    log_probs_TV = model.target_log_probs(model.hidden(torch.tensor([ids])))[0].detach()
    expected = sum(float(log_probs_TV[index - 1, ids[index]]) for index in range(len(prompt), len(ids)))
    for trusted in (True, False):
        measured = models.HFLM(pretrained=str(folder), device="cpu", trust_remote_code=trusted)
        asked = [api.Instance("loglikelihood", {}, (TURN, continuation), 0)]
        assert measured.loglikelihood(asked)[0][0] == pytest.approx(expected, abs=1e-3)
        until = {"until": ["never"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
        with pytest.warns(UserWarning, match="MultiTokenEOSCriteria may keep something between calls"):
            (written,) = measured.generate_until([api.Instance("generate_until", {}, (TURN, until), 0)])
        assert written == text
