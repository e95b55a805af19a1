"""Pinned packages, masking, files, folders and datasets; no network: wheels are made here."""

import gzip
import hashlib
import json
import re
import subprocess
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cpdlm.config import Config, ConfigError, resolve
from cpdlm.data import packages, sources
from cpdlm.data.packages import Package
from cpdlm.data.personal import mask_personal
from cpdlm.data.readers import CORPORA, READERS, is_plain_code
from cpdlm.data.sources import pieces

CODE = b"def function(argument):\n    return argument + argument\n\n"


def make_wheel(path: Path, files: dict[str, bytes]) -> str:
    """A zip with fixed times; returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(zipfile.ZipInfo(name), content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fake_package(folder: Path, name: str, files: dict[str, bytes], **changes: Any) -> Package:
    digest = make_wheel(folder / f"{name}-1-py3-none-any.whl", files)
    settings = {"reader": "python", "licence": "MIT", "attribution": "us", "held_out": False} | changes
    return Package(name, "1", digest, **settings)


def config(tmp_path: Path, **changes: Any) -> Config:
    return resolve({"data.cache": str(tmp_path / "cache"), **{key.replace("__", "."): v for key, v in changes.items()}})


def test_cached_wheel_is_read_and_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"p/good.py": CODE * 5, "p/short.py": b"x = 1\n", "p/a.txt": CODE * 5, "p/latin.py": CODE * 5 + b"# \xe9\n"}
    package = fake_package(tmp_path / "cache" / "packages", "p", files)
    monkeypatch.setitem(CORPORA, "code", (package,))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("nothing may be downloaded"))
    documents = sources.locate(config(tmp_path)).read()
    assert documents.texts == [CODE * 5]
    assert documents.notes == {"p": {"files": 3, "kept": 1}}


def test_unreachable_index_names_package_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def refuse(command: list[str], **settings: Any) -> Any:
        calls.append(command)
        assert settings["stdin"] == subprocess.DEVNULL and "--no-input" in command, "pip would wait for an answer"
        return types.SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(ConfigError, match=r"(?s)sympy==1\.14\.0 could not be .*\(ERROR: No .*data.bundle=DIR"):
        sources.locate(config(tmp_path)).read()
    assert len(calls) == 1 and "--ignore-requires-python" in calls[0] and "install" not in calls[0]


def test_pip_never_asks_and_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that wants a password used to hang; a full disk was blamed on the index."""
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho 'OSError: [Errno 28] No space left on device' >&2\nexit 1")
    pip.chmod(0o755)
    monkeypatch.setattr(packages.sys, "executable", str(pip))
    with pytest.raises(ConfigError, match=r"sympy==1\.14\.0 .*disk of .*cache.* is full; free some space"):
        sources.locate(config(tmp_path)).read()
    pip.write_text("#!/bin/sh\nexec sleep 60")
    monkeypatch.setattr(packages, "SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"sympy==1\.14\.0: pip was not done after 0 s"):
        sources.locate(config(tmp_path)).read()


def test_wrong_checksum_is_refused_and_torn_wheel_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = fake_package(tmp_path / "index", "p", {"p/good.py": CODE * 5})
    served = (tmp_path / "index" / package.wheel).read_bytes()

    def download(command: list[str], **settings: Any) -> Any:
        Path(command[command.index("--dest") + 1], package.wheel).write_bytes(served)
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    torn = tmp_path / "cache" / "packages" / package.wheel
    torn.parent.mkdir(parents=True)
    torn.write_bytes(served[:50])
    assert packages.fetch(package, tmp_path / "cache").read_bytes() == served
    torn.unlink()
    served = served[:-1] + b"x"
    with pytest.raises(ConfigError, match=f"p==1: the package index gave another file.*{package.sha256}"):
        packages.fetch(package, tmp_path / "cache")
    assert not torn.exists()


@pytest.mark.parametrize(
    "content",
    [
        CODE,  # under 200 bytes
        CODE * 8000,  # over 400 kB
        CODE * 5 + b"x" * 1001,  # a very long line
        (b"a" * 90 + b"\n") * 50,  # long lines throughout
        b"1, 2, 3, 4,\n" * 50,  # a table
        CODE * 5 + b"\xff",  # not UTF-8
    ],
)
def test_code_filter(content: bytes) -> None:
    assert is_plain_code(CODE * 5) and not is_plain_code(content)


def chat_wheel(folder: Path) -> Package:
    def said(sender: str, *texts: str) -> list[dict[str, str]]:
        return [{"text": text, "timestamp": "2018-05-02T19:38:15Z", "sender": sender} for text in texts]

    a, b = "720840be-e522-47ba-9e9f-143f66372673", "549cc1d1-270e-4a53-b561-133a8d0086b4"
    talk = [said(a, "Hello", "I'm Kimberly"), said(b, "hi kimberly\n nice"), said(a, "bye")]
    chat = {"x": {"prompt": "?", "start": "2018", "messages": talk}, "y": {"messages": [said(a, "anyone?")]}}
    return fake_package(folder, "chat", {"chitchat_dataset/dataset.json": json.dumps(chat).encode()}, reader="chat")


def test_chat_has_speakers_and_neither_ids_nor_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CORPORA, "text", (chat_wheel(tmp_path / "cache" / "packages"),))
    documents = sources.locate(config(tmp_path, corpus="text")).read()
    assert documents.texts == [b"A: Hello\nA: I'm <name>\nB: hi <name> nice\nA: bye\n"]
    assert documents.notes["chat"]["masked_name_mentions"] == 2


EVERYDAY = [["I will hope that it is pretty cold, i'm tired and sorry"]] * 3


@pytest.mark.parametrize(
    ("messages", "masked"),
    [
        (["My name is Zorella", "zorella is nice, Zorella's"], ["My name is <name>", "<name> is nice, <name>'s"]),
        (["my name's actually brian!"], ["my name's actually <name>!"]),
        (["his name is Tim Krumm, a teacher"], ["his name is <name> <name>, a teacher"]),
        (["I'm Ty, but my friends call me Morgie"], ["I'm <name>, but my friends call me <name>"]),
        (["Hey Kyle!", "nice to meet you, Elena"], ["Hey <name>!", "nice to meet you, <name>"]),
        (
            ["I'm Sorry. I'm tired. my names tired", "I'm Korean"],
            ["I'm Sorry. I'm tired. my names tired", "I'm Korean"],
        ),
        (["My name is Will, I will go"], ["My name is <name>, I will go"]),
        (["mail jo.doe+x@mail.example.org or www.example.org/jo"], ["mail <email> or <url>"]),
        (["see https://example.org/u/jo?x=1 ok"], ["see <url> ok"]),
        (["follow @jo.doe on insta", "jo.doe is mine, doe"], ["follow <handle> on insta", "<name> is mine, <name>"]),
        (["(808) 555-1557, 808-555-1557 or 8085551557"], ["<phone>, <phone> or <phone>"]),
        (["+44 20 7946 0958 and 555-0123"], ["<phone> and <phone>"]),
        (["2013-2015, 3.14159265358979, 4 8 15 16 23 42"], ["2013-2015, 3.14159265358979, 4 8 15 16 23 42"]),
    ],
)
def test_masking(messages: list[str], masked: list[str]) -> None:
    got, _ = mask_personal([*EVERYDAY, messages])
    assert got[-1] == masked
    assert got[:-1] == EVERYDAY, "a name is masked in its own conversation only"


def test_masking_of_the_real_corpus() -> None:
    package = CORPORA["text"][0]
    path = Path(Config().data.cache) / "packages" / package.wheel
    if not path.is_file():
        pytest.skip(f"{package.name} is not in the cache")
    with zipfile.ZipFile(path) as wheel:
        texts, notes = READERS["chat"](wheel)
    everything = b"".join(texts).decode()
    assert notes["masked_names"] > 200 and notes["masked_email"] == 2 and notes["masked_phone"] >= 2
    for pattern in (r"@gmail", r"https?://", r"\b\d{3}-\d{4}\b", r"2018-\d\d-\d\d", r"[0-9a-f]{8}-[0-9a-f]{4}-"):
        assert not re.search(pattern, everything), pattern
    # A first name and a handle that were seen in the raw text, by the start of their sha256.
    words = {hashlib.sha256(word.encode()).hexdigest()[:16] for word in set(re.findall(r"\w+", everything.lower()))}
    assert not words & {"fbb919c4d3016f38", "d7fba55c9809dbe8"}


# --- the user's own --------------------------------------------------------------------------------------------------


def test_empty_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="empty.txt is empty"):
        sources.locate(config(tmp_path, corpus=str(tmp_path / "empty.txt")))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "image").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(ConfigError, match="no text file in this folder"):
        sources.locate(config(tmp_path, corpus=str(tmp_path / "folder")))


def test_folder_takes_text_files_and_identity_is_content(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.txt").write_bytes(b"first")
    (folder / "sub" / "b.md").write_bytes(b"caf\xe9")
    (folder / ".git" / "config").write_bytes(b"hidden")
    (folder / "c.bin").write_bytes(b"\0\1")
    origin = sources.locate(config(tmp_path, corpus=str(folder)))
    assert sorted(origin.read().texts) == [b"caf\xe9", b"first"]
    (folder / "a.txt").rename(folder / "z.txt")
    assert sources.locate(config(tmp_path, corpus=str(folder))).identity == origin.identity
    (folder / "z.txt").write_bytes(b"other")
    assert sources.locate(config(tmp_path, corpus=str(folder))).identity != origin.identity


@pytest.mark.parametrize(
    "content", [gzip.compress(b"text\n" * 100, mtime=0), "text\n".encode("utf-16"), b"\x7fELF\0\0"]
)
def test_what_is_no_text_is_no_corpus(content: bytes, tmp_path: Path) -> None:
    said = r"is no text \(it has NUL bytes\); unpack it, or convert it to UTF-8"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        sources.locate(config(tmp_path, corpus=str(tmp_path / "folder" / "a")))
    (tmp_path / "folder" / "b").write_bytes(b"text")
    with pytest.warns(UserWarning, match=f"1 of 2 files are left out: .*a {said}"):
        documents = sources.locate(config(tmp_path, corpus=str(tmp_path / "folder"))).read()
    assert documents.texts == [b"text"] and documents.notes == {"folder": {"files": 2, "not_text": 1}}


TEXTS = [b"paragraph\nof lines\n\n" * 2000, b"line\n" * 9000, b"x" * 90_000, b"\xff\xfe\r\n\r\n" * 9000, b"short"]


@pytest.mark.parametrize("content", [*TEXTS, b"a\n\n \n"])
def test_pieces_lose_nothing(content: bytes) -> None:
    found = pieces(content)
    assert b"".join(found) == content
    assert all(len(piece) <= 6 * sources.PIECE and piece.strip() for piece in found)
    if len(content) > 20_000:
        assert len(found) > 4
