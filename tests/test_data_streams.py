"""Datasets streamed to disk: the text is the stream's whoever reads it; a killed reader goes on from its last note.

Local folders of JSON lines, through `datasets` itself.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from cpdlm.config import Config, ConfigError, resolve
from cpdlm.data import sources, streams
from cpdlm.data.streams import Stream, fetch_stream

SHARDS, DOCUMENTS = 3, 400


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    for shard in range(SHARDS):
        rows = [{"id": str(i), "text": "" if i % 50 == 7 else f"shard {shard} story {i} é"} for i in range(DOCUMENTS)]
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def story(dataset: Path) -> list[bytes]:
    """Every document, in the order of the stream."""
    rows = [json.loads(line) for path in sorted(dataset.iterdir()) for line in path.read_text().splitlines()]
    return [row["text"].encode() for row in rows if row["text"]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps its own cache out of the home folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "huggingface"))


def config(tmp_path: Path, dataset: Path, **changes: object) -> Config:
    settings = {"data.cache": str(tmp_path / "cache"), "corpus": f"hf:{dataset}"}
    return resolve(settings | {key.replace("__", "."): value for key, value in changes.items()})


def until(story: list[bytes], limit: int) -> list[bytes]:
    return story[: int(np.searchsorted(np.cumsum([len(text) for text in story]), limit)) + 1]


@pytest.mark.parametrize("limit", [1000, 12_000, 10**6])
def test_a_stream_is_read_once_up_to_the_limit(limit: int, dataset: Path, story: list[bytes], tmp_path: Path) -> None:
    chosen = config(tmp_path, dataset, data__max_bytes=limit)
    origin = sources.locate(chosen)
    assert list(origin.read().texts) == until(story, limit)
    (folder,) = (tmp_path / "cache" / "hf").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "meta.json", "offsets.npy", "texts.bin"]
    elsewhere = config(tmp_path, dataset, data__max_bytes=limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_open", lambda stream: pytest.fail("read again"))
        assert sources.locate(elsewhere).identity == origin.identity
    (folder / "texts.bin").write_bytes(b"torn")
    again = sources.locate(chosen)
    assert again.identity == origin.identity and list(again.read().texts) == until(story, limit)


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("kills", [[900], [150, 300, 350]])
def test_a_killed_reader_goes_on_behind_its_last_note(
    kills: list[int], dataset: Path, story: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kills: after how many documents of each session."""
    monkeypatch.setattr(streams, "NOTE_BYTES", 1000)
    stream, read, whole = Stream(str(dataset), 10**6, tmp_path), 0, streams._texts
    for kill in [*kills, 10**6]:
        session: list[int] = []

        def texts(*given: Any, session: list[int] = session, kill: int = kill) -> Iterator[bytes | None]:
            for text in whole(*given):
                session.append(len(text or b""))
                yield text
                if len(session) == kill:
                    raise Killed

        monkeypatch.setattr(streams, "_texts", texts)
        try:
            fetch_stream(stream)
        except Killed:
            assert len(session) == kill
        read += sum(session)
    assert list(stream.texts()) == story, "a document is lost or repeated"
    assert read - sum(map(len, story)) <= len(kills) * (1000 + 20), "more is read again than lay behind the last note"


def test_one_column_for_the_whole_set_and_its_nulls_are_counted(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    rows = [{"id": "1", "text": None}, {"id": "2", "text": "told"}, {"id": "3", "text": None}]
    for shard, chosen in enumerate((rows, rows[2:], [{"id": "4", "text": "again"}])):
        lines = "".join(json.dumps(row) + "\n" for row in chosen)
        (tmp_path / "set" / f"{shard}.jsonl").write_text(lines)
    documents = sources.locate(config(tmp_path, tmp_path / "set")).read()
    assert list(documents.texts) == [b"told", b"again"]
    assert documents.notes == {str(tmp_path / "set"): {"null_rows": 3}}
    other = sources.locate(config(tmp_path, tmp_path / "set", data__column="id")).read()
    assert list(other.texts) == [b"1", b"2", b"3", b"3", b"4"]
    with pytest.raises(ConfigError, match=r"data.column=txt: .* there are id \(string\), text \(string\)"):
        sources.locate(config(tmp_path, tmp_path / "set", data__column="txt"))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "0.jsonl").write_text(json.dumps({"text": ["one"]}) + "\n")
    with pytest.raises(ConfigError, match=r"cannot tell which column .* there are text \(List.*one of strings"):
        sources.locate(config(tmp_path, tmp_path / "lists"))


@pytest.mark.parametrize("column", ["text", "body"])
def test_a_first_file_of_nulls_does_not_say_what_the_others_hold(column: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for shard, texts in enumerate(([None, None], ["told", None], ["again"])):
        columns = {"row": [*range(len(texts))], column: texts}
        if column == "text":  # and others begin with nulls as well
            columns["more"] = [[shard] if shard else None] * len(texts)
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "set" / f"{shard}.parquet")
    documents = sources.locate(config(tmp_path, tmp_path / "set")).read()
    assert list(documents.texts) == [b"told", b"again"]
    assert documents.notes == {str(tmp_path / "set"): {"null_rows": 3}}


def test_other_files_are_another_text(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset that was replaced, one of the same relative name elsewhere, and one that grew after a kill."""

    def read(folder: Path) -> list[bytes]:
        monkeypatch.chdir(folder)
        chosen = config(tmp_path, Path("data"))
        return list(sources.locate(chosen).read().texts)

    for name in ("one", "two"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "0.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert read(tmp_path / "one") == [b"one"] and read(tmp_path / "two") == [b"two"]
    (tmp_path / "two" / "data" / "0.jsonl").write_text(json.dumps({"text": "new"}) + "\n")
    assert read(tmp_path / "two") == [b"new"]
    # On the hub, files change under one name: what a killed reader left of the others goes.
    there = {"version": "a", "texts": ["one", "two"]}

    def opened(stream: Stream) -> tuple[Any, str]:
        import datasets

        whole = datasets.Dataset.from_dict({"text": there["texts"]}).to_iterable_dataset(num_shards=2)
        return whole, str(there["version"])

    monkeypatch.setattr(streams, "_open", opened)
    stream = Stream("who/what", 100, tmp_path)
    stream.folder.mkdir(parents=True)
    # Of the same version it goes on, of another or behind what is gone it begins anew.
    for version, kept, right in (
        ("a", b"one", [b"one", b"one", b"two"]),
        ("b", b"one", [b"new", b"one"]),
        ("a", b"", [b"one", b"two"]),
    ):
        (stream.folder / "texts.bin").write_bytes(kept)
        (stream.folder / "lengths.bin").write_bytes(np.int64(3).tobytes())
        (stream.folder / "position.json").write_text(json.dumps({"version": "a", "bytes": 3, "documents": 1}))
        there |= {"version": version, "texts": ["new", "one"] if version == "b" else ["one", "two"]}
        fetch_stream(stream)
        assert list(stream.texts()) == right
        (stream.folder / "meta.json").unlink()
