"""Tokenising in pieces: the same arrays by any number of processes and after any kill; finished pieces are not made again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from cpdlm.config import Config, ConfigError, resolve
from cpdlm.data import corpus as corpus_module
from cpdlm.data import tokens
from cpdlm.data.corpus import load_corpus
from cpdlm.data.pool import processes
from tests.test_data_corpus import prose

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "texts"
    made.mkdir()
    for number in range(80):
        (made / f"{number}.txt").write_bytes(prose(number))
    return made


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tokens, corpus_module):
        monkeypatch.setattr(module, "PIECE_BYTES", 8000)


def config(tmp_path: Path, folder: Path, tokenizer: str, count: int = 1) -> Config:
    return resolve(
        {
            "corpus": str(folder),
            "data.tokenizer": tokenizer,
            "data.processes": count,
            "data.cache": str(tmp_path / "cache"),
            "data.context": 32,
            "decode.prompt_tokens": 8,
            "decode.new_tokens": 8,
        }
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_pieces_and_processes_change_nothing(
    tokenizer: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_corpus(config(tmp_path / "whole", folder, tokenizer), progress=False).describe()
    for module in (tokens, corpus_module):
        monkeypatch.setattr(module, "PIECE_BYTES", 8000)
    for count in (1, 2) if tokenizer == "bpe:300" else (1,):
        index = tmp_path / str(count)
        assert load_corpus(config(index, folder, tokenizer, count), progress=False).describe() == whole
        assert len([p for p in (index / "cache" / "tokens").iterdir() if p.is_dir()]) == 1, "pieces are left behind"


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.usefixtures("small_pieces")
def test_a_killed_run_makes_only_the_pieces_that_are_missing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_corpus(config(tmp_path / "whole", folder, "bpe:300"), progress=False).describe()
    made: list[str] = []
    original = tokens.write_piece

    def dying(tokenizer: Any, path: Path, texts: list[bytes]) -> None:
        if len(made) == 4:
            path.with_suffix(".partial").write_bytes(b"torn")
            raise Killed
        original(tokenizer, path, texts)
        made.append(path.name)

    monkeypatch.setattr(tokens, "write_piece", dying)
    chosen = config(tmp_path, folder, "bpe:300")
    with pytest.raises(Killed):
        load_corpus(chosen, progress=False)
    before, made[:] = list(made), []
    monkeypatch.setattr(tokens, "write_piece", lambda *a: (original(*a), made.append(a[1].name)))
    monkeypatch.setattr(corpus_module, "build_tokenizer", lambda *a: pytest.fail("another tokenizer"))
    assert load_corpus(chosen, progress=False).describe() == whole
    assert len(before) == 4 and made and not set(before) & set(made)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_of_the_pool_is_named() -> None:
    with pytest.raises(ConfigError, match="one of data.processes=2 processes was killed.*data.processes=1 needs less"):
        with processes(2, print) as pool:
            pool.submit(_die).result()


BUILD = """
import sys
import cpdlm.data.corpus as corpus, cpdlm.data.tokens as tokenising
from cpdlm.config import resolve
tokens.PIECE_BYTES = corpus.PIECE_BYTES = 50_000
if __name__ == "__main__":
    corpus.load_corpus(resolve(dict(word.split("=", 1) for word in sys.argv[1:])), progress=False)
"""


@pytest.mark.slow
def test_finished_pieces_survive_kill_9(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(150):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(prose(number, words=3000))
    words = [
        f"corpus={tmp_path / 'texts'}",
        f"data.cache={tmp_path / 'cache'}",
        "data.tokenizer=bpe:2000",
        "data.processes=2",
    ]
    command = [sys.executable, "-c", BUILD, *words]
    build = subprocess.Popen(command, cwd=ROOT)
    end = time.monotonic() + 120
    while len(found := list((tmp_path / "cache" / "tokens").glob(".pieces-*/*.npz"))) < 5:
        assert build.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    build.send_signal(signal.SIGKILL)
    build.wait()
    times = {path: path.stat().st_mtime_ns for path in found}
    again = subprocess.Popen(command, cwd=ROOT)
    held: dict[Path, int] = {}
    while again.poll() is None:  # looked at until they are joined and go
        for path in found:
            if path.exists():
                held[path] = path.stat().st_mtime_ns
        time.sleep(0.01)
    assert again.returncode == 0 and held == times, "a finished piece is made again"
    chosen = resolve(dict(word.split("=", 1) for word in words))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        killed = load_corpus(chosen, progress=False).describe()
    chosen.data.cache = str(tmp_path / "other")
    assert load_corpus(chosen, progress=False).describe() == killed
    assert [path.name for path in (tmp_path / "cache" / "tokens").glob(".p*")] == []
