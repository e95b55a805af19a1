"""Splits, near-duplicates, the token cache and bundles. No network: corpora are folders and wheels made here."""

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cpdlm.config import Config, ConfigError, resolve
from cpdlm.data import corpus as corpus_module
from cpdlm.data import sources
from cpdlm.data.corpus import load_corpus, write_bundle
from cpdlm.data.documents import Documents
from cpdlm.data.duplicates import clusters
from cpdlm.data.splits import assign_splits, take
from cpdlm.data.stored import SPLITS, Corpus
from cpdlm.data.tokenizer import BytesTokenizer
from cpdlm.files import WriteError
from tests.test_data_sources import fake_package
from tests.tiny import MICRO, code_folder

ROOT = Path(__file__).resolve().parent.parent
WORDS = [f"word{number}" for number in range(3000)]


def prose(seed: int, words: int = 120) -> bytes:
    draw = np.random.default_rng(seed)
    return " ".join(draw.choice(WORDS, size=words)).encode() + b"\n"


def edited(text: bytes, seed: int, share: float = 0.03) -> bytes:
    """A copy with a few words changed: a near-duplicate."""
    draw = np.random.default_rng(seed)
    words = text.decode().split()
    for place in draw.choice(len(words), size=max(1, int(share * len(words))), replace=False):
        words[place] = "changed"
    return " ".join(words).encode()


def config(tmp_path: Path, **changes: object) -> Config:
    settings = MICRO | {"data.cache": str(tmp_path / "cache"), "data.context": 32}
    return resolve({**settings, **{key.replace("__", "."): value for key, value in changes.items()}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "texts"
    made.mkdir()
    for number in range(60):
        (made / f"{number}.txt").write_bytes(prose(number))
    (made / "latin.txt").write_bytes(prose(99) + b"caf\xe9 \xff")
    return made


def texts(corpus: Corpus, split: str) -> list[bytes]:
    """Documents back from tokens, checking bos and eos."""
    chosen = corpus.split(split)
    found = []
    for begin, end in zip(chosen.offsets[:-1], chosen.offsets[1:], strict=True):
        ids = chosen.tokens[begin:end]
        assert ids[0] == ids[-1] == 256
        found.append(ids[1:-1].astype(np.uint8).tobytes())
    return found


# --- near-duplicates and splits --------------------------------------------------------------------------------------


def slow_clusters(texts: list[bytes]) -> list[int]:
    """Pairs by sets of 8-word tuples, then flooding."""
    sets = [
        {tuple(w[i : i + 8]) for i in range(len(w) - 7)} for w in (re.findall(rb"[\w\x80-\xff]+", t) for t in texts)
    ]
    label = list(range(len(texts)))
    for _ in texts:
        for i, a in enumerate(sets):
            for j, b in enumerate(sets):
                if a and b and i != j and len(a & b) >= 0.5 * min(len(a), len(b)):
                    label[i] = label[j] = min(label[i], label[j])
    return label


def test_clusters_equal_those_of_a_slow_loop() -> None:
    base = [prose(seed, words=30 + 5 * seed) for seed in range(12)]
    family = [edited(base[0], seed) for seed in range(3)]
    part = base[5][: len(base[5]) // 3]  # contained in a longer one
    joined = [base[1] + base[2], b"too short", b"", "naïve café ".encode() * 6, "naïve cafe ".encode() * 6]
    documents = base + family + [part] + joined
    assert clusters(documents).tolist() == slow_clusters(documents)


def test_a_large_family_stays_together_in_any_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [prose(seed) for seed in range(10)] + [edited(prose(3), seed) for seed in range(40)]
    whole = clusters(documents)
    assert set(whole[10:].tolist()) == {3} and len(set(whole.tolist())) == 10
    monkeypatch.setattr("cpdlm.data.duplicates.CHUNK", 1000)
    assert np.array_equal(clusters(documents), whole)
    monkeypatch.setattr("cpdlm.data.duplicates.SHINGLES", 1000)  # sampling keeps copies together too
    assert np.array_equal(clusters(documents), whole)


def planted(held_out: bool = False) -> tuple[Documents, list[list[int]]]:
    """400 documents; every fifth has a near-duplicate and a copy. Returns groups of indices that belong together."""
    documents = Documents()
    base = [prose(6000 + seed) for seed in range(400)]
    near = [edited(text, seed) for seed, text in enumerate(base[::5])]
    documents.add_source("a", base[:300] + near)
    documents.add_source("b", base[300:] + base[::10], held_out=held_out)
    where: dict[bytes, list[int]] = {}
    for index, text in enumerate(documents.texts):
        where.setdefault(text, []).append(index)
    return documents, [[*where[base[5 * i]], *where[text]] for i, text in enumerate(near)]


def test_near_duplicates_and_copies_never_cross_splits(tmp_path: Path) -> None:
    documents, groups = planted()
    assignment, counts = assign_splits(documents, config(tmp_path))
    split_of = {index: name for name, indices in assignment.items() for index in indices}
    assert sum(map(len, assignment.values())) == len(split_of), "a document is in one split only"
    assert counts["copies_dropped"] == 40 and counts["near_duplicates"] == 80
    assert len({split_of[i] for group in groups for i in group if i in split_of}) == 3, "the test must reach all splits"
    for group in groups:
        assert len({split_of[i] for i in group if i in split_of}) == 1
    kept = [documents.texts[i] for i in split_of]
    assert len(set(kept)) == len(kept) and set(kept) == set(documents.texts)


def test_every_release_holds_out_other_documents(tmp_path: Path) -> None:
    documents, _ = planted()
    found = [assign_splits(documents, config(tmp_path, data__release=n))[0] for n in (0, 1, 2)]
    held_out = [set(each["test"]) | set(each["validation"]) for each in found]
    assert all(set(each["test"]) <= set(found[0]["train"]) for each in found[1:])
    assert not held_out[0] & held_out[1] and not held_out[1] & held_out[2] and not held_out[0] & held_out[2]
    assert all(10 < len(each["test"]) < 50 for each in found)


def test_held_out_source_is_the_test_split_and_its_near_duplicates_leave(tmp_path: Path) -> None:
    documents, groups = planted(held_out=True)
    assignment, counts = assign_splits(documents, config(tmp_path))
    assert {documents.sources[i] for i in assignment["test"]} == {1}
    held_out = {t for t, s in zip(documents.texts, documents.sources, strict=True) if s == 1}
    assert {documents.texts[i] for i in assignment["test"]} == held_out
    others = {i for name in ("train", "validation") for i in assignment[name]}
    for group in groups:
        if any(documents.sources[i] == 1 for i in group):
            assert not others & set(group)
    assert counts["near_held_out_dropped"] > 20


def test_split_does_not_depend_on_order_and_keeps_its_shares(tmp_path: Path) -> None:
    documents = Documents()
    documents.add_source("a", [f"{seed} {seed * seed}".encode() for seed in range(4000)])
    turned = Documents(documents.texts[::-1], documents.sources[::-1], documents.source_names)
    first, _ = assign_splits(documents, config(tmp_path))
    second, _ = assign_splits(turned, config(tmp_path))
    for name in SPLITS:
        assert [documents.texts[i] for i in first[name]] == [turned.texts[i] for i in second[name]]
    # 4000 draws at 5 %: 200 +- 14 (one standard deviation).
    assert abs(len(first["test"]) - 200) < 70 and abs(len(first["validation"]) - 200) < 70


def test_max_bytes_takes_each_split_in_proportion(tmp_path: Path) -> None:
    documents = Documents()
    documents.add_source("a", [prose(seed, words=40) for seed in range(400)])
    assignment, _ = assign_splits(documents, config(tmp_path))
    chosen = {name: take(documents, assignment[name], assignment, 30_000) for name in SPLITS}
    sizes = {name: sum(len(documents.texts[i]) for i in indices) for name, indices in chosen.items()}
    assert 27_000 < sum(sizes.values()) < 33_000 and min(sizes.values()) >= 1_500
    for name in SPLITS:
        assert chosen[name] == assignment[name][: len(chosen[name])], "the first in hash order"
    assert all(len(take(documents, assignment[name], assignment, 1)) == 1 for name in SPLITS)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_load_and_describe(tmp_path: Path, folder: Path) -> None:
    chosen = config(tmp_path, corpus=str(folder))
    corpus = load_corpus(chosen)
    everything = [text for name in SPLITS for text in texts(corpus, name)]
    assert sorted(everything) == sorted(path.read_bytes() for path in folder.iterdir()), "non-UTF-8 included"
    described = corpus.describe()
    assert described["splits"]["train"]["bytes"] == sum(map(len, texts(corpus, "train"))) == corpus.train.bytes
    assert described["tokenizer"] == "bytes" and described["vocab_size"] == 257 and len(described["sha256"]) == 64
    assert json.loads(json.dumps(described)) == described
    assert corpus.train.tokens.dtype == np.uint16 and isinstance(corpus.train.tokens, np.memmap)
    assert corpus.test.source_names == ["texts"] and set(corpus.test.source_ids) == {0}


def test_cached_corpus_is_not_built_again_and_rebuilding_gives_the_same(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(tmp_path, corpus=str(folder))
    first = load_corpus(chosen).describe()
    elsewhere = config(tmp_path / "other", corpus=str(folder))
    assert load_corpus(elsewhere).describe() == first
    monkeypatch.setattr(corpus_module, "_build", lambda *a: pytest.fail("built again"))
    assert load_corpus(chosen).describe() == first


def test_key_follows_content_tokenizer_and_size(tmp_path: Path, folder: Path) -> None:
    def caches() -> int:
        return len([path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()])

    load_corpus(config(tmp_path, corpus=str(folder)))
    load_corpus(config(tmp_path, corpus=str(folder), data__context=16, horizon=2))
    assert caches() == 1, "the context is not part of the tokens"
    load_corpus(config(tmp_path, corpus=str(folder), data__max_bytes=20_000))
    (folder / "latin.txt").unlink()
    load_corpus(config(tmp_path, corpus=str(folder)))
    load_corpus(config(tmp_path, corpus=str(folder), data__tokenizer="bpe:300"))
    assert caches() == 4


def test_a_tokenizer_of_the_hub_is_what_its_files_are(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "build_tokenizer", lambda *given: BytesTokenizer())
    for digest in ("one", "one", "another"):
        monkeypatch.setattr(corpus_module, "tokenizer_hash", lambda *given, digest=digest: digest)
        load_corpus(config(tmp_path, corpus=str(folder), data__tokenizer="hf:owner/name"))
    assert len([path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]) == 2


def cut(path: Path) -> None:
    tokens = path / "train" / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-100])


def flip(path: Path) -> None:
    tokens = path / "validation" / "tokens.npy"
    content = bytearray(tokens.read_bytes())
    content[-2] ^= 1
    tokens.write_bytes(content)


def foreign(path: Path) -> None:
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"format": 0}))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (cut, "is not the file that was written"),
    (flip, "is not the file that was written"),
    (lambda path: (path / "test" / "offsets.npy").unlink(), "torn or foreign"),
    (lambda path: (path / "meta.json").write_text("[]"), "torn or foreign"),
    (foreign, "has format 0"),
]


def test_torn_or_foreign_cache_is_rebuilt_with_a_warning(tmp_path: Path, folder: Path) -> None:
    chosen = config(tmp_path, corpus=str(folder))
    before = load_corpus(chosen).describe()
    (path,) = (p for p in (tmp_path / "cache" / "tokens").iterdir() if p.is_dir())
    for spoil, message in DAMAGES:
        spoil(path)
        with pytest.warns(UserWarning, match=f"{message}.*building it again"):
            assert load_corpus(chosen).describe() == before
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_corpus(chosen)
        assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2, "the folder and its lock; nothing half-made"


BUILD = """
import sys
from cpdlm.config import resolve
from cpdlm.data.corpus import load_corpus
print(load_corpus(resolve(dict(word.split("=", 1) for word in sys.argv[1:]))).describe()["sha256"])
"""


def test_two_processes_at_once(tmp_path: Path, folder: Path) -> None:
    words = [f"corpus={folder}", f"data.cache={tmp_path / 'cache'}", "data.context=256"]
    running = [
        subprocess.Popen([sys.executable, "-c", BUILD, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    hashes = {process.communicate(timeout=60)[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hashes == {load_corpus(config(tmp_path, corpus=str(folder))).describe()["sha256"]}


def test_evaluation_splits_are_sorted_by_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = []
    for number, name in enumerate(("p", "q")):
        files = {f"{name}/{i}.py": prose(1000 * number + i, words=60).replace(b" ", b"\n") for i in range(150)}
        packages.append(fake_package(tmp_path / "cache" / "packages", name, files))
    monkeypatch.setitem(sources.CORPORA, "code", tuple(packages))
    corpus = load_corpus(config(tmp_path))
    assert corpus.source_names == ["p", "q"] and set(corpus.test.source_ids) == {0, 1}
    assert (np.diff(corpus.test.source_ids) >= 0).all() and (np.diff(corpus.validation.source_ids) >= 0).all()


# --- bundles ---------------------------------------------------------------------------------------------------------

BUNDLED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("datasets", "tokenizers", "transformers", "mlflow", "pip"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
from cpdlm.config import resolve
from cpdlm.data.corpus import load_corpus
for tokenizer in ("bytes", "bpe:300"):
    corpus = load_corpus(resolve({**dict(word.split("=", 1) for word in sys.argv[1:]), "data.tokenizer": tokenizer}))
    print(corpus.describe()["sha256"], corpus.token_bytes()[corpus.test.tokens].sum() == corpus.test.bytes)
"""


def test_bundle_round_trip_without_datasets_and_tokenizers(tmp_path: Path, folder: Path) -> None:
    (folder / "latin.txt").unlink()
    configs = [config(tmp_path, corpus=str(folder), data__tokenizer=name) for name in ("bytes", "bytes", "bpe:300")]
    sizes = write_bundle(configs, tmp_path / "bundle")
    assert len(sizes) == 2 and all(sizes.values())
    bundled = resolve({"corpus": str(folder), "data.bundle": str(tmp_path / "bundle"), "data.tokenizer": "bpe:300"})
    assert load_corpus(bundled).tokenizer.decode(load_corpus(bundled).test.tokens[:50]).startswith("word")
    wanted = [load_corpus(each).describe()["sha256"] for each in configs[1:]]
    for path in folder.iterdir():
        path.unlink()
    words = [f"corpus={folder}", f"data.bundle={tmp_path / 'bundle'}", f"data.cache={tmp_path / 'nothing'}"]
    done = subprocess.run([sys.executable, "-c", BUNDLED, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [wanted[0], "True", wanted[1], "True"]
    assert not (tmp_path / "nothing").exists()


def test_bundle_errors(tmp_path: Path, folder: Path) -> None:
    chosen = config(tmp_path, corpus=str(folder))
    with pytest.raises(ConfigError, match=r"the bundle has .* MiB, more than 0.0: .*; lower data.max_bytes"):
        write_bundle([chosen], tmp_path / "bundle", limit_bytes=1000)
    assert not (tmp_path / "bundle").exists()
    write_bundle([chosen], tmp_path / "bundle")

    def bundled(where: str = "bundle", **changes: object) -> Config:
        return config(tmp_path, corpus=str(folder), data__bundle=str(tmp_path / where), **changes)

    with pytest.raises(ConfigError, match=r"does not hold .*max_bytes=5; it holds corpus=.*max_bytes=0"):
        load_corpus(bundled(data__max_bytes=5))
    (archive,) = (tmp_path / "bundle").glob("*/tokens.npz")
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"tokens.npz is missing, cut or changed"):
        load_corpus(bundled())


# --- the real corpora ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["code", "text"])
def test_real_corpora(tmp_path: Path, name: str) -> None:
    cache = Path(os.environ.get("CPDLM_TEST_CACHE", tmp_path / "cache"))
    chosen = resolve({"corpus": name, "data.cache": str(cache)})
    corpus = load_corpus(chosen)
    assert load_corpus(chosen).describe() == corpus.describe()
    sizes = {split: corpus.split(split).bytes for split in SPLITS}
    if name == "code":
        assert sizes["train"] > 25e6 and sizes["test"] > 5e6
        assert set(corpus.test.source_ids) == {corpus.source_names.index("networkx")}
        assert corpus.source_names.index("networkx") not in set(corpus.train.source_ids)
    else:
        assert sizes["train"] > 15e6 and min(sizes.values()) > 5e5
        assert all(set(corpus.split(split).source_ids) == {0, 1, 2} for split in SPLITS)


@pytest.mark.parametrize("where", ["file/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written_is_named(where: str, tmp_path: Path) -> None:
    code_folder(tmp_path)
    (tmp_path / "file").touch()
    cache = tmp_path / where
    with pytest.raises(WriteError, match=f"cannot write {cache}: .*data.cache=DIR"):
        load_corpus(resolve(MICRO | {"corpus": str(tmp_path), "data.cache": str(cache)}))
