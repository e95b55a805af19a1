"""`transformers serve` on an exported folder, and `transformers chat` with it: the text of `generate`, with drafts."""

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
