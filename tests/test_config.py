"""The config: every error says what is wrong and what to type; precedence; help; round trips; sizes."""

import os
import subprocess
import sys

import pytest

from cpdlm.config import (
    CHOICES,
    PRESETS,
    Config,
    ConfigError,
    as_yaml,
    expand,
    flatten,
    from_dict,
    leaves,
    parse,
    resolve,
    to_dict,
    without_credentials,
)
from cpdlm.config.reading import OBSOLETE

BAD: list[tuple[str, str]] = [
    # words and names
    ("rank", "'rank' is not a setting; write KEY=VALUE, for example rank=8"),
    ("rnak=8", "unknown setting 'rnak'; did you mean rank?"),
    ("optim.warmpu=1", "unknown setting 'optim.warmpu'; did you mean optim.warmup?"),
    ("zzzzzzzz=1", "unknown setting 'zzzzzzzz' (--help lists them all)"),
    # choices
    ("preset=smoke,nope", "preset='nope' is not one of"),
    ("size=huge", "size='huge' is not one of micro, tiny, small, base, 56m, 1b"),
    ("link=firsts", "link='firsts' is not one of none, first, all, blind; did you mean link=first?"),
    # types
    ("rank=four", f"rank='four': expected int; the default is {Config().rank}"),
    ("optim.lr=fast", f"optim.lr='fast': expected float; the default is {Config().optim.lr}"),
    ("model.tie_first=perhaps", "model.tie_first='perhaps': expected bool; the default is False"),
    ("name=${nowhere}", "name='${nowhere}'"),
    *(
        (f"name={name}", f"name={name!r} must be the name of a folder")
        for name in ("/", "..", "a/b", "../..", "x" * 201)
    ),
    # ranges
    *(
        (f"{key}={entry.metadata['least'] - 1}", f"is too small; the least is {entry.metadata['least']}")
        for key, entry in leaves().items()
        if entry.metadata["least"] is not None
    ),
    *(
        (f"{key}={bad}", f"{key}={bad} must lie in {entry.metadata['within']}")
        for key, entry in leaves().items()
        if entry.metadata["within"]
        for bad in ("-0.1", "nan", "inf")
    ),
    ("loss.joint_fraction=0", "loss.joint_fraction=0.0 must lie in (0, 1]"),
    ("optim.lr=0", "optim.lr=0.0 must lie in (0, 1e6]"),
    ("decode.temperature=0", "decode.temperature=0.0 must lie in [1e-6, 1e6] (greedy is always measured)"),
    # combinations
    ("horizon=256 data.context=256", "horizon=256 does not fit data.context=256; lower the horizon"),
    ("horizon=1 rank=4", "rank=4 needs horizon of at least 2"),
    ("horizon=1 rank=1 link=first", "link=first needs horizon of at least 2 (horizon=1)"),
    ("horizon=1 rank=1 model.trunk=runs/t", "model.trunk=runs/t needs horizon of at least 2"),
    ("model.head=separate model.map_rank=4", "model.map_rank=4 needs model.head=shared"),
    ("devices=3 data.batch_rows=8", "does not divide into devices=3 x train.accumulate=1; try data.batch_rows=9"),
    ("nodes=2 devices=3 data.batch_rows=8", "nodes=2 x devices=3 x train.accumulate=1; try data.batch_rows=6"),
    ("train.sharded=true parallel=ddp", "train.sharded=true needs parallel=fsdp (parallel=ddp has the whole model"),
    ("model.trunk=runs/x train.recompute=true", "model.trunk=runs/x is frozen and keeps no activations"),
    ("devices=4 train.accumulate=4 data.batch_rows=8", "each needs a row of its own: lower them to 8 together"),
    ("decode.new_tokens=250 decode.prompt_tokens=64", "=64 + decode.new_tokens=250 exceed data.context=256"),
    ("data.tokenizer=word", "data.tokenizer='word': write bytes, bpe:SIZE with SIZE from 257 to 1048576, hf:NAME, or,"),
    ("data.tokenizer=model", "data.tokenizer=model, that of a pretrained model: type model=NAME"),
    ("preset=retrofit", "preset=retrofit has data.tokenizer=model, that of a pretrained model: type model=NAME"),
    ("model=x", "data.tokenizer=bytes is not the tokenizer of the pretrained model x"),
    ("model=x data.tokenizer=bpe:999", "type data.tokenizer=model"),
    ("model.family=pretrained data.tokenizer=model", "needs the model: type model=NAME"),
    ("model.dtype=bfloat16", "model.dtype=bfloat16 is for pretrained trunks"),
    ("data.text=greedy", "data.text=greedy is for heads on a frozen model: give model=NAME"),
    (
        "data.text=greedy model.trunk=runs/t",
        "data.text=greedy needs data.states: how many tokens the model shall write",
    ),
    ("data.prompts=functions", "data.prompts=functions is for text that the model writes: type data.text=sampled"),
    ("loss.objective=blend", "loss.objective=blend is for heads on a frozen model: give model=NAME"),
    ("loss.gamma=0.5 model.trunk=x model.head=separate", "loss.gamma=0.5 needs model.head=shared"),
    ("data.states=10 model.trunk=x", "data.states=10 tokens are less than one row of data.context=256"),
    ("joint=hmm horizon=2 model.tie_first=true", "joint=hmm needs horizon of at least 3"),
    ("loss.target_top=8 model.trunk=x", "loss.target_top=8: loss.objective=joint has no target"),
    ("loss.normaliser_tokens=9 model.trunk=x", "loss.normaliser_tokens=9 needs loss.target_top"),
    ("loss.objective=blind", "did you mean loss.objective=blend?"),
    ("train.decode_prompts=2 parallel=fsdp", "train.decode_prompts=2 needs whole weights"),
    ("train.decode_prompts=99", "train.decode_prompts=99 are more than decode.prompts="),
    ("preset=cpu-heads", "is for heads on a frozen trunk: make one with preset=cpu-trunk,trunk"),
    ("seed=9223372036854775808", "seed=9223372036854775808 is too large; the most is 4294967295"),
    ("rank=99999999999", "rank=99999999999 is too large; the most is 2147483647"),
    ("data.workers=100000", "data.workers=100000 is too large; the most is 1024"),
    ("optim.beta1=1", "optim.beta1=1.0 must lie in [0, 1)"),
    ("optim.lr=1e38", "optim.lr=1e+38 must lie in (0, 1e6]"),
    ("data.tokenizer=bpe:100", "data.tokenizer='bpe:100'"),
    ("data.tokenizer=hf:", "data.tokenizer='hf:'"),
]


def test_every_mistake_says_what_is_wrong() -> None:
    for words, message in BAD:
        with pytest.raises(ConfigError) as caught:
            parse(words.split())
        assert message in str(caught.value) and "\n" not in str(caught.value), words


def test_every_number_has_a_range() -> None:
    for key, entry in leaves().items():
        kind = {"int": entry.metadata["least"] is not None, "float": bool(entry.metadata["within"])}
        assert kind.get(entry.type, True), key


# What some choices are for.
PRETRAINED = {"model.trunk": "a folder", "model.family": "pretrained", "data.tokenizer": "model"}
CHOSEN_FOR = {
    "loss.objective": {"model.trunk": "a folder"},
    "model.dtype": PRETRAINED,
    "data.text": {"model.trunk": "a folder", "data.states": 512},
    "data.prompts": {"model.trunk": "a folder", "data.states": 512, "data.text": "sampled"},
}


def test_every_choice_resolves() -> None:
    for key, values in CHOICES.items():
        for value in values:
            assert flatten(resolve({key: value} | CHOSEN_FOR.get(key, {})))[key] == value


def test_precedence_is_defaults_then_presets_in_order_then_the_command_line() -> None:
    assert parse([]) == Config() == resolve({})
    smoke = parse(["preset=smoke"])
    assert (smoke.size, smoke.optim.steps, smoke.rank) == ("micro", 60, Config().rank)
    assert parse(["optim.steps=7", "preset=smoke"]).optim.steps == 7, "the command line wins wherever it stands"
    assert parse(["rank=2", "rank=3"]).rank == 3, "the later word wins"
    sizes = [parse([f"preset={names}", "model.trunk=t"]).size for names in ("smoke,cpu-heads", "cpu-heads,smoke")]
    assert sizes == ["small", "micro"]
    assert expand({"preset": "smoke,cpu-heads", "optim.steps": 9})["optim.steps"] == 9


def test_every_preset_resolves_and_names_real_settings() -> None:
    frozen_for = {
        "retrofit": "model=a",
        "cpu-heads": "model.trunk=a",
        "gpu-heads": "model.trunk=a",
        "many": "model.trunk=a",
    }
    for preset, overrides in PRESETS.items():
        frozen = frozen_for.get(preset, "seed=0")
        values = flatten(parse([f"preset={preset}", frozen]))
        assert all(values[key] == value for key, value in overrides.items()) and values["preset"] == preset


def test_round_trips() -> None:
    config = parse(["preset=smoke", "rank=2", "optim.lr=1e-5", "name=été: a # b", "model.tie_first=true"])
    assert from_dict(to_dict(config)) == config
    from omegaconf import OmegaConf

    again = OmegaConf.to_container(OmegaConf.create(as_yaml(config)))
    assert isinstance(again, dict) and from_dict(again) == config  # type: ignore[arg-type]
    assert set(flatten(config)) == set(leaves())


def test_a_word_that_is_not_utf8_is_refused_as_it_is_typed() -> None:
    with pytest.raises(ConfigError, match=r"corpus=caf\\xe9 is not UTF-8"):
        parse([os.fsdecode(b"corpus=caf\xe9")])
    assert parse(["corpus=caf\xe9"]).corpus == "caf\xe9"


def test_a_foreign_config_is_refused() -> None:
    for saved, said in (
        ({"rank": 2, "colour": "red"}, "written by another version"),
        ({"rank": "many"}, "written by another version"),
        ({"rank": 0}, "too small"),
        ({"name": "../../elsewhere"}, "must be the name of a folder"),
    ):
        with pytest.raises(ConfigError, match=said):
            from_dict(saved)


def test_nothing_is_resolved_in_what_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "found")
    for saved in ({"corpus": "${oc.env:SECRET}"}, {"data": {"cache": "a/${oc.env:SECRET}"}}, {"seed": "${rank}"}):
        with pytest.raises(ConfigError, match=r"\$\{.*saved settings are values"):
            from_dict(saved)
    assert parse(["corpus=${oc.env:SECRET}"]).corpus == "found", "on the command line it is the user's own"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:p@ss@host/db", "postgresql://host/db"),
        ("https://host/x?user=a&password=b&api_key=c&page=2", "https://host/x?user=a&password=***&api_key=***&page=2"),
        ("sqlite:///runs/a@b.db", "sqlite:///runs/a@b.db"),
        ("http://token@host:5000", "http://host:5000"),
    ],
)
def test_what_logs_in_is_not_saved(address: str, shown: str) -> None:
    config = parse([f"tracking.uri={address}"])
    assert config.tracking.uri == address and to_dict(config)["tracking"]["uri"] == shown
    assert f"uri: {shown}\n" in as_yaml(config).replace("'", "")
    assert without_credentials(f"run.py tracking.uri={address} seed=1") == f"run.py tracking.uri={shown} seed=1"


def test_earlier_settings_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    frozen = {"model.trunk": "a folder"}
    new = resolve(frozen | {"loss.draft_vocabulary": 5, "decode.draft_vocabulary": 7})
    assert resolve(frozen | {"loss.shortlist": 5, "decode.shortlist": 7}) == new
    saved = to_dict(new)
    for group in ("loss", "decode"):
        saved[group]["shortlist"] = saved[group].pop("draft_vocabulary")
    assert from_dict(saved) == new and "shortlist" in saved["loss"], "what was read is not changed"
    for group, name in (key.split(".") for key in OBSOLETE):
        saved[group][name] = 2
    assert from_dict(saved) == new
    assert parse([f"{key}=2" for key in OBSOLETE]) == Config()
    assert "data.processes=2 is ignored: " in capsys.readouterr().err
    later = parse(["preset=retrofit", "model=m", "decode.draft_vocabulary=7", "decode.shortlist=9"])
    assert later.decode.draft_vocabulary == 9 and later.loss.draft_vocabulary == 8192


def test_the_name_of_a_run_says_no_place() -> None:
    here, there = (parse([f"corpus={folder}/texts"]).run_name for folder in ("/home/me", "/home/you"))
    assert here.startswith("texts-") and "home" not in here and here != there


def test_what_follows_from_the_settings() -> None:
    assert not parse([]).first_is_tied and parse(["link=first"]).first_is_tied
    assert parse(["model.tie_first=true"]).first_is_tied and parse(["preset=trunk"]).first_is_tied
    assert parse([]).target == "own" and parse(["model.trunk=runs/t"]).target == "common"
    retrofit = parse(["preset=retrofit", "model=some/SmolLM2-135M.gguf", "rank=8"])
    assert retrofit.is_pretrained and retrofit.run_name == "code-smollm2-135m-common-r8-n4-none-tied-eq14-s0"


def test_the_page_comes_without_torch() -> None:
    code = "import sys, cpdlm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
