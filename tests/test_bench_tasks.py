"""`cpdlm bench`: prompts of tasks, methods side by side, and what a terminal, a file and the report show of them."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_pretrained import loaded
from transformers.generation.candidate_generator import AssistedCandidateGenerator, EarlyExitCandidateGenerator

from cpdlm import benchmark, cli
from cpdlm.bench.compare import Protocol
from cpdlm.bench.contenders import exit_layer
from cpdlm.bench.table import fitting
from cpdlm.bench.tasks import MODES, Comparison
from cpdlm.benchmark import Request, measure
from cpdlm.config import ConfigError
from cpdlm.data.conversations import messages, written
from cpdlm.data.prompts import _first_turn, read_task
from cpdlm.data.tokenizer import BytesTokenizer
from cpdlm.hf.load import load
from experiments.bench import tasks as bench_tasks
from experiments.report import tasks
from tests.test_export import make_run
from tests.tiny import code_folder, small_pretrained

ROW = {"task", "method", "mode", "prompts", "tokens_per_forward", "accepted_by_depth", "speedup", "tokens_per_second"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, {"rank": 2, "horizon": 3, "model.tie_first": True}, measured=False)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tasks") / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def f(x", "for", "import os")))
    return str(path)


def test_batches_and_single_texts_count_alike(run: Path, prompts: str) -> None:
    """The same seeds: what is counted in batches is what the timed texts did, prompt by prompt.

    (Depths differ at the ends of texts, where a batch drafts for the row that has most to write.)
    """
    common = {"model": str(run), "tasks": (prompts,), "new_tokens": 12, "nodes": 3, "rows": 2, "weights": "plain"}
    timed = measure(Request(**common, repeats=1, warmups=1))
    counted = measure(Request(**common, acceptance_only=True))
    keys = ("tokens", "forwards", "tokens_per_forward", "prompts")
    found = {(each["method"], each["mode"]): each for each in timed.entries}
    names = {"AR", "generate", "generate-lookup", "lookup", "chain", "tree", "lookup+chain", "lookup+tree"}
    names |= {"chain-paying", "lookup+chain-paying"}
    sampled = {"block", "lookup+block", "branched", "lookup+branched"}
    assert set(found) == {(name, mode) for name in names for mode in ("greedy", "T=1")} | {
        (name, "T=1") for name in sampled
    }
    names -= {"chain-paying", "lookup+chain-paying"}
    assert {each["method"] for each in counted.entries} == names - {"AR", "generate"} | sampled
    for entry in counted.entries:
        other = found[entry["method"], entry["mode"]]
        assert {key: entry[key] for key in keys} == {key: other[key] for key in keys}
        assert entry["speedup"] is None and entry["tokens_per_second"] is None
    assert found["AR", "greedy"]["tokens_per_forward"]["mean"] == 1.0 == found["AR", "greedy"]["speedup"]["median"]
    assert all(each["other_than_autoregressive"] == 0 for (_, mode), each in found.items() if mode == "greedy")
    assert all(each["speedup_over_generate"]["median"] > 0 for each in found.values())


def test_a_method_that_is_a_chain_under_greedy_is_left_out_beside_the_chain_alone(run: Path, prompts: str) -> None:
    common = {"model": str(run), "tasks": (prompts,), "new_tokens": 4, "acceptance_only": True}
    for methods, greedy in ((("branched",), {"branched"}), (("branched", "chain"), {"chain"})):
        entries = measure(Request(**common, methods=methods)).entries
        assert {each["method"] for each in entries if each["mode"] == "greedy"} == greedy
        assert {each["method"] for each in entries if each["mode"] == "T=1"} == set(methods)


def test_prompts_that_are_decoded_at_once_have_the_texts_of_single_ones(run: Path, prompts: str) -> None:
    common = {"model": str(run), "tasks": (prompts,), "new_tokens": 12, "repeats": 1, "warmups": 1}
    single = measure(Request(**common, methods=("chain", "generate")))
    both = measure(Request(**common, methods=("chain", "generate"), batch=2))
    counts = {each["method"]: each["tokens"] for each in single.entries if each["mode"] == "greedy"}
    for entry in both.entries:
        assert entry["method"] in ("AR", "chain") and entry["speedup"]["median"] > 0
        if entry["mode"] == "greedy":
            first, second, third = counts[entry["method"]]
            assert entry["tokens"] == [first + second, third]
            assert entry["forwards"][0] < first + second or entry["method"] == "chain"


def test_a_text_ends_where_the_models_text_ends(run: Path, prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For our loop as for generate: with every token an end, each writes one."""
    monkeypatch.setattr(benchmark, "_load", lambda request: replace(load(run), eos=list(range(257))))
    found = measure(Request(str(run), (prompts,), new_tokens=12, repeats=1, warmups=0))
    assert {tuple(each["tokens"]) for each in found.entries} == {(1, 1, 1)}


def test_the_command_writes_rows_table_and_figure(
    run: Path, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--methods", "chain", "--prompts", "2", "--new-tokens", "6", "--repeats", "2", "--warmups", "0"]
    words += ["--json", str(tmp_path / "rows.json"), "--output", str(tmp_path / "new")]
    assert cli.main(["bench", str(run), "--tasks", prompts, *words]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["mode"]) for row in rows] == [(m, k) for k in MODES for m in ("AR", "chain")]
    assert all(set(row) == ROW and set(row["speedup"]) == {"median", "low", "high", "sem"} for row in rows)
    assert rows[0]["prompts"] == 2 and rows[0]["accepted_by_depth"] == [] and len(rows[1]["accepted_by_depth"]) > 0
    out = capsys.readouterr().out
    assert "| mine | greedy | chain " in out and out.startswith((tmp_path / "new" / "bench.md").read_text()[:200])
    assert (tmp_path / "new" / "bench.png").stat().st_size > 1000


def test_a_model_without_heads_is_measured(tmp_path: Path, prompts: str) -> None:
    texts = sorted(code_folder(tmp_path).glob("*.py"))
    folder = small_pretrained(tmp_path / "model", texts)
    found = measure(Request(str(folder), (prompts,), prompts=1, new_tokens=4, repeats=1, warmups=0))
    assert {each["method"] for each in found.entries} == {"AR", "generate", "generate-lookup", "lookup"}
    with pytest.raises(ConfigError, match="--methods chain drafts with heads, and this model has none"):
        measure(Request(str(folder), (prompts,), methods=("chain",)))
    with pytest.raises(ConfigError, match="--acceptance-only counts accepted drafts; give --methods that draft"):
        measure(Request(str(folder), (prompts,), methods=("generate",), acceptance_only=True))
    with pytest.raises(ConfigError, match="model=nobody/nothing.* a hub name"):
        measure(Request("nobody/nothing", (prompts,)))


def test_early_layers_and_a_second_model_draft_for_generate(
    tmp_path: Path, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward of the target is counted for each round of drafts; the model is its own perfect assistant."""
    texts = sorted(code_folder(tmp_path).glob("*.py"))
    folder = small_pretrained(tmp_path / "model", texts)
    monkeypatch.setattr("cpdlm.model.pretrained.multiplies_bfloat16", lambda: False)  # no near-ties
    monkeypatch.setattr(Comparison, "_prompts", lambda self: [torch.tensor(self.task.prompts[0])])
    drafted = []
    propose = AssistedCandidateGenerator.get_candidates

    def spy(self: Any, *arguments: Any, **options: Any) -> Any:
        drafted.append(type(self))
        return propose(self, *arguments, **options)

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", spy)
    methods = ("generate-early-exit", "generate-assisted")
    request = Request(str(folder), (prompts,), methods=methods, new_tokens=12, repeats=1, warmups=0)
    found = {(each["method"], each["mode"]): each for each in measure(replace(request, assistant=str(folder))).entries}
    made = {name: sum(each["forwards"][0] for (m, _), each in found.items() if m == name) for name in methods}
    early = sum(each is EarlyExitCandidateGenerator for each in drafted)
    assert made == {methods[0]: early, methods[1]: len(drafted) - early}
    assert found["generate-assisted", "greedy"]["tokens_per_forward"]["mean"] > 1.5
    assert all(found[name, "greedy"]["other_than_autoregressive"] == 0 for name in methods)
    other = small_pretrained(tmp_path / "other", texts[:1])
    for name, said in {"": "need each other; give both", str(other): "has another vocabulary than the model"}.items():
        with pytest.raises(ConfigError, match=said):
            measure(replace(request, assistant=name))


@pytest.mark.slow
def test_what_torch_compiled_writes_the_same(tmp_path: Path, prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = sorted(code_folder(tmp_path).glob("*.py"))
    folder = small_pretrained(tmp_path / "model", texts)
    monkeypatch.setattr("cpdlm.model.pretrained.multiplies_bfloat16", lambda: False)  # no near-ties
    request = Request(str(folder), (prompts,), methods=("generate-compiled",), new_tokens=12, repeats=1, warmups=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        (_, greedy, *_) = measure(request).entries
    assert greedy["method"] == "generate-compiled" and greedy["other_than_autoregressive"] == 0
    assert greedy["forwards"] == greedy["tokens"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler; install"):
        measure(request)


def test_a_model_that_runs_all_its_layers_has_no_early_exit(pretrained: dict[str, Path]) -> None:
    assert exit_layer(loaded(pretrained["llama tied"])) == 1
    with pytest.raises(ConfigError, match="a gpt2 model runs all of its layers"):
        exit_layer(loaded(pretrained["gpt2"]))


FAKE = """
import json
from types import SimpleNamespace
common_speculative_type = SimpleNamespace(COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE="simple")
def CommonParams():
    parts = {name: SimpleNamespace() for name in ("model", "cpuparams", "cpuparams_batch")}
    return SimpleNamespace(**parts, speculative=SimpleNamespace(types=["none"]))
class Server:
    def __init__(self, params):
        self.params = params
        print("a word that is no answer")
    def handle_completions(self, question):
        with open("ASKED", "a") as asked:
            print(json.dumps(question), file=asked)
        drafts = {"draft_n_accepted": 4} if self.params.speculative.types != ["none"] else {}
        return {"usage": {"completion_tokens": question["n_predict"]}, "timings": drafts}
"""


def test_llama_cpp_is_asked_for_the_same_texts(run: Path, prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's ids, no filter, no reuse of an earlier prompt. The fake drafts every third token."""
    place = run.parent / "fake"
    place.mkdir()
    (place / "xllamacpp.py").write_text(FAKE.replace("ASKED", str(place / "asked")))
    (run.parent / "model.gguf").touch()
    methods = ("llama.cpp", "llama.cpp-ngram-simple")
    request = Request(str(run), (prompts,), methods=methods, new_tokens=12, repeats=1, warmups=0)
    with pytest.raises(ConfigError, match="--methods llama.cpp reads a GGUF file"):
        measure(request)
    request = replace(request, gguf=run.parent / "model.gguf")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ConfigError, match="pip install xllamacpp"):
        measure(request)
    monkeypatch.delitem(sys.modules, "xllamacpp")
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", str(place))
    found = measure(request)
    per_forward = {each["method"]: each["tokens_per_forward"] for each in found.entries if each["mode"] == "T=1"}
    assert per_forward["llama.cpp"]["mean"] == 1.0 and per_forward["llama.cpp-ngram-simple"]["mean"] == 12 / 8
    assert {each["other_than_autoregressive"] for each in found.entries if "llama" in each["method"]} == {None}
    asked = [json.loads(line) for line in (place / "asked").read_text().splitlines()]
    sampled = [question for question in asked if question["temperature"] == 1.0]
    assert sampled[0]["prompt"] == [256, *b"def f(x"] and not sampled[0]["cache_prompt"]
    assert (sampled[0]["top_k"], sampled[0]["top_p"], sampled[0]["min_p"]) == (0, 1.0, 0.0)
    with pytest.raises(ConfigError, match="llama.cpp gave no answer"):
        measure(replace(request, methods=("llama.cpp-ngram-mod",)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "mine.jsonl has no prompts"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "line 2 has neither a prompt nor messages"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "line 1 has neither"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
        ('{"messages": [{"role": "user", "content": "b"}]}', "no chat template"),
    ],
)
def test_files_that_are_no_tasks_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_task(str(tmp_path / "mine.jsonl"), BytesTokenizer(), tmp_path, 9)


def test_other_mistakes_are_named(run: Path, prompts: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such task and no such file; did you mean humaneval"):
        read_task("humanevil", BytesTokenizer(), tmp_path, 9)
    for words, message in {
        ("--methods", "chian"): "did you mean chain",
        ("--prompts", "0"): "--prompts 0 measures nothing",
        ("--new-tokens", "62"): "prompt 1 of mine has 8 tokens; with 62 new ones",
    }.items():
        given = vars(cli.parse("bench", [str(run), "--tasks", prompts, *words]))
        request = Request(**{name: value for name, value in given.items() if name not in ("json", "output")})
        with pytest.raises(ConfigError, match=message):
            measure(request)


def test_the_first_turn_is_no_greeting() -> None:
    turns = [("user", "Hi!"), ("assistant", "What do you do today?"), ("user", "I sleep\nall day"), ("user", "a b c d")]
    conversation = messages(written(turns))
    assert _first_turn(conversation) == "I sleep\nall day" and _first_turn(conversation[:2]) == ""


def made_rows() -> list[dict[str, Any]]:
    speedup = {"median": 1.2345, "low": 1.1, "high": 1.3}
    row = {"task": "humaneval", "method": "llama.cpp-ngram-simple", "mode": "greedy", "prompts": 100}
    numbers = {"tokens_per_forward": 1.5, "accepted_by_depth": [0.5] * 7, "speedup": speedup, "tokens_per_second": 9.0}
    return [row | numbers, row | {"method": "AR", "mode": "T=1"} | dict.fromkeys(numbers) | {"accepted_by_depth": []}]


def test_a_table_fits_its_terminal() -> None:
    narrow, wide = fitting(made_rows(), 40), fitting(made_rows(), 200)
    assert max(map(len, narrow.splitlines())) <= 40 and "    speed-up [95 %]: 1.23 [1.10, 1.30]" in narrow
    assert len({len(line) for line in wide.splitlines()}) == 1 and wide.startswith("| task ")


def test_a_record_is_shown_by_the_report(run: Path, prompts: str, tmp_path: Path) -> None:
    words = ["--tasks", prompts, "--methods", "chain", "--new-tokens", "6", "--warmups", "0", "--output"]
    folder = tmp_path / "benchmarks"
    assert bench_tasks.main([str(run), "--name", "smollm2", *words, str(folder), "--repeats", "2"]) == 0
    assert bench_tasks.main([str(run), "--name", "counted", "--acceptance-only", *words, str(folder)]) == 0
    record = json.loads((folder / "tasks_smollm2.json").read_text())
    assert {"command", "commit", "seed", "hardware", "settings"} <= set(record) and record["benchmark"] == "tasks"
    (made,) = tasks.tables(tmp_path)
    assert not isinstance(made.table, str)
    assert [row[:4] for row in made.table.rows] == [
        *(("counted", "mine", mode, "chain") for mode in ("greedy", "T=1")),
        *(("smollm2", "mine", mode, method) for mode in ("greedy", "T=1") for method in ("AR", "chain")),
    ]
    assert "2 interleaved repeats" in made.table.caption


def test_a_killed_measurement_goes_on_where_it_was(
    run: Path, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is finished stands beside the output until that is written; of other weights or options nothing is taken."""
    request = Request(str(run), (prompts,), methods=("chain",), new_tokens=4, repeats=1, warmups=0)
    file, whole, calls = tmp_path / "r", Comparison.timed, []

    def killed(comparison: Comparison, protocol: Protocol) -> list[dict[str, Any]]:
        calls.append(comparison.mode)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(comparison, protocol)

    monkeypatch.setattr(Comparison, "timed", killed)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(request, file)
    first = json.loads((tmp_path / "r.parts").read_bytes())["parts"]["mine, greedy"]
    found = measure(request, file)
    assert calls == ["greedy", "T=1", "T=1"] and found.entries[:2] == first
    assert "goes on after mine, greedy" in capsys.readouterr().err
    measure(replace(request, new_tokens=5), file)
    assert calls[3:] == ["greedy", "T=1"] and "is of another measurement" in capsys.readouterr().err
    benchmark.run(replace(request, new_tokens=5), file)
    assert calls[5:] == [] and file.is_file() and not (tmp_path / "r.parts").exists()
