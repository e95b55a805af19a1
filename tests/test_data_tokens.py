"""Tokenising in pieces: the same arrays whatever the pieces and after any kill, and no process is started."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpdlm.config import Config, resolve
from cpdlm.data import corpus as corpus_module
from cpdlm.data import tokens
from cpdlm.data.corpus import load_corpus
from tests.test_data_corpus import prose
from tests.tiny import MICRO

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "texts"
    made.mkdir()
    for number in range(80):
        (made / f"{number}.txt").write_bytes(prose(number))
    return made


def settings(cache: Path, folder: Path, tokenizer: str) -> dict[str, Any]:
    return MICRO | {"corpus": str(folder), "data.tokenizer": tokenizer, "data.cache": str(cache)}


def config(cache: Path, folder: Path, tokenizer: str) -> Config:
    return resolve(settings(cache, folder, tokenizer))


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_pieces_and_kills_change_nothing_and_finished_pieces_are_kept(
    tokenizer: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_corpus(config(tmp_path / "whole", folder, tokenizer)).describe()
    for module in (tokens, corpus_module):
        monkeypatch.setattr(module, "PIECE_BYTES", 8000)
    made: list[str] = []
    original = tokens.write_piece

    def dying(tokenizer: Any, path: Path, texts: list[bytes], conversations: bool) -> None:
        if len(made) == 4:
            path.with_suffix(".partial").write_bytes(b"torn")
            raise Killed
        original(tokenizer, path, texts)
        made.append(path.name)

    monkeypatch.setattr(tokens, "write_piece", dying)
    chosen = config(tmp_path / "cache", folder, tokenizer)
    with pytest.raises(Killed):
        load_corpus(chosen)
    before, made[:] = list(made), []
    monkeypatch.setattr(tokens, "write_piece", lambda *a: (original(*a), made.append(a[1].name)))
    monkeypatch.setattr(corpus_module, "build_tokenizer", lambda *a: pytest.fail("another tokenizer"))
    assert load_corpus(chosen).describe() == whole
    assert len(before) == 4 and made and not set(before) & set(made)
    assert len([p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir()]) == 1, "pieces are left behind"


def test_a_script_without_a_main_guard_loads_a_corpus(tmp_path: Path, folder: Path) -> None:
    """A library that starts processes would run the script again in each, and wait for a lock of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        "from cpdlm.config import resolve\nfrom cpdlm.data import corpus, tokens\n"
        "tokens.PIECE_BYTES = corpus.PIECE_BYTES = 8000\n"
        f"corpus.load_corpus(resolve({settings(tmp_path / 'cache', folder, 'bpe:300')!r}))\n"
        "print('loaded')\n"
    )
    command = [sys.executable, str(script)]
    there = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "loaded\n", done.stderr
