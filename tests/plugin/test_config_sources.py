"""Flags, files and config_dict are data: nothing in them is run, and every literal keeps its meaning."""

from __future__ import annotations

import sys

import pytest
from recbole.config import Config
from recbole.model.context_aware_recommender import kd_dagfm
from recbole.trainer import HyperTuning

from recbole_cce import cli
from recbole_cce.errors import UserError
from recbole_cce.plugin.config_sources import literal

RAN = "__import__('pathlib').Path('ran').touch()"
CODE = [
    RAN,
    "exit()",
    "9**9**9",
    "print(1)",
    "[1 for _ in iter(int, 1)]",
    "(lambda: 1)()",
    "f'{exit()}'",
    "1/0",
    "os",
    "key",
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-5", -5),
        ("0,1", (0, 1)),
        ("['a', 'b']", ["a", "b"]),
        ("{'LS': 'valid_and_test'}", {"LS": "valid_and_test"}),
        ("{'RS': [0.8, 0.1, 0.1]}", {"RS": [0.8, 0.1, 0.1]}),
        ("'2020'", "2020"),
        (r"'\t'", "\t"),
        ("True", True),
        ("false", False),
        ("None", None),
        ("CCE-", "CCE-"),
        ("[3,inf)", "[3,inf)"),
        ("[a, b]", "[a, b]"),
        ("", ""),
        (" ", " "),
        ("{1, 2}", "{1, 2}"),
        ("1j", "1j"),
        ("(" * 10_000, "(" * 10_000),
        *((code, code) for code in CODE),
    ],
)
def test_literals(text, value):
    assert literal(text) == value
    assert type(literal(text)) is type(value)


@pytest.mark.parametrize("model", ["SASRecCCE", "SASRec", "GRU4Rec"])
@pytest.mark.parametrize("code", CODE)
def test_what_reaches_config_is_a_string(monkeypatch, tiny_config, tmp_path, code, model):
    (tmp_path / "own.yaml").write_text(f'wandb_project: "{code}"\n')
    from_file = Config(model, "tiny", ["own.yaml"], tiny_config)
    from_dict = Config(model, "tiny", config_dict={**tiny_config, "wandb_project": code})
    monkeypatch.setattr(sys, "argv", ["test", f"--wandb_project={code}"])
    from_flag = Config(model, "tiny", config_dict=tiny_config)
    assert [config["wandb_project"] for config in (from_file, from_dict, from_flag)] == [code] * 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "flags",
    [
        [f"--learning_rate={RAN}"],
        ["--learning_rate=exit()"],
        ["--hidden_size=9**9**9"],
        [f"--dataset={RAN}"],
        ["--dataset=exit()"],
        ["--dataset=9**9**9"],
        [f"--model={RAN}"],
        [f"--gpu_id={RAN}"],
        ["--model=SASRec", f"--learning_rate={RAN}"],
        [f"--nproc={RAN}"],
        [f"--config_files={RAN}"],
        [f"--resume={RAN}"],
        ["compare", f"--models={RAN}", "--output=out"],
        ["compare", "--models=SASRecCCE", f"--vary=learning_rate:{RAN}", "--output=out"],
        ["compare", "--models=SASRecCCE", "--vary=hidden_size:9**9**9", "--output=out"],
        ["compare", "--models=SASRecCCE", f"--variant=a=SASRecCCE,learning_rate={RAN}", "--output=out"],
        ["compare", "--models=SASRecCCE", f"--learning_rate={RAN}", "--output=out"],
        ["compare", "--models=SASRecCCE", "--dataset=exit()", "--output=out"],
        ["compare", "--models=SASRecCCE", f"--seeds={RAN}", "--output=out"],
        ["recommend", f"--checkpoint={RAN}", "--output=top.csv"],
        ["plan", f"--items={RAN}", "--length=1", "--hidden=1", "--gpu-memory=1"],
    ],
    ids=" ".join,
)
def test_no_flag_of_the_script_runs_code(monkeypatch, capsys, tmp_path, flags):
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("run_recbole_cce.py: error: ")
    assert not (tmp_path / "ran").exists()


def test_yaml_tags_make_no_objects(tiny_config, tmp_path):
    (tmp_path / "own.yaml").write_text("wandb_project: !!python/object/apply:os.mkdir [ran]\n")
    with pytest.raises(UserError, match=r"config_file_list: 'own\.yaml' is not YAML: "):
        Config("SASRecCCE", "tiny", ["own.yaml"], tiny_config)
    assert not (tmp_path / "ran").exists()


def test_other_calls_of_eval_in_recbole(tmp_path):
    """The values of a file for HyperTuning, and the key that names the teacher of KD_DAGFM."""
    pytest.importorskip("hyperopt")
    (tmp_path / "space.txt").write_text(f"learning_rate choice [{RAN}]\n")
    with pytest.raises(ValueError, match="malformed"):
        HyperTuning(lambda: 0, params_file="space.txt")
    with pytest.raises(ValueError, match=r"teacher: .*it takes one of CrossNet, CIN"):
        kd_dagfm.eval(RAN)
    assert kd_dagfm.eval("CIN") is kd_dagfm.CIN
    assert not (tmp_path / "ran").exists()
