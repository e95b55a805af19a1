"""Tokenising in pieces: the same arrays whatever the pieces and after any kill."""

from pathlib import Path
from typing import Any

import pytest

from cpdlm.config import Config, resolve
from cpdlm.data import corpus as corpus_module
from cpdlm.data import tokens
from cpdlm.data.corpus import load_corpus
from tests.test_data_corpus import prose
from tests.tiny import MICRO


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "texts"
    made.mkdir()
    for number in range(80):
        (made / f"{number}.txt").write_bytes(prose(number))
    return made


def config(cache: Path, folder: Path, tokenizer: str) -> Config:
    return resolve(MICRO | {"corpus": str(folder), "data.tokenizer": tokenizer, "data.cache": str(cache)})


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
