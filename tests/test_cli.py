"""The command line: flags that reach the run, one line for each mistake, help, doctor, downloads."""

from __future__ import annotations

import functools
import http.server
import os
import re
import socket
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import recbole
import torch
import yaml
from recbole.config import Config
from recbole.utils import url

from recbole_cce import cli
from recbole_cce.nn import item_table
from recbole_cce.ops import linear_cross_entropy
from recbole_cce.plugin import config_checks, config_keys, entry_points, registration, repairs
from recbole_cce.plugin.saved_config import rebuilt
from recbole_cce.training import evaluation
from tests.conftest import write_inter
from tests.process import SCRIPT, python


@pytest.fixture
def command(monkeypatch, tiny_config, tmp_path):
    """Call the command line on `tiny` with further flags, in this process."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**tiny_config, "epochs": 1}))

    def call(*flags, files="tiny.yaml"):
        named = ["--dataset=tiny"] if not any(flag.startswith("--dataset") for flag in flags) else []
        monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", f"--config_files={files}", *named, *flags])
        cli.main()

    return call


@pytest.fixture
def mistake(command, capsys):
    """Call the command line with a mistake; returns the one line it ends with."""

    def call(*flags, **options):
        with pytest.raises(SystemExit) as stop:
            command(*flags, **options)
        assert stop.value.code == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith("run_recbole_cce.py: error: ")
        assert "\n" not in message
        return message.removeprefix("run_recbole_cce.py: error: ")

    return call


def saved_config(tmp_path, model="SASRecCCE"):
    (file,) = (tmp_path / "saved").glob(f"{model}-*.pth")
    return rebuilt(torch.load(file)["config"])


# Runs


def test_a_run_without_a_terminal(tiny_config, tmp_path):
    """As a user starts it: a fresh process; the log has the metrics, and no noise of NumPy, pandas or torch."""
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{rng.integers(12)}", s, "a b" if s else "") for u in range(20) for s in range(5)]
    write_inter(tmp_path / "data", "tiny", "user_id:token\titem_id:token\ttimestamp:float\ttags:token_seq", rows)
    quick = {**tiny_config, "epochs": 1, "load_col": None, "state": "INFO", "show_progress": True}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(quick))
    process = python(SCRIPT, "--dataset=tiny", "--config_files=tiny.yaml")
    assert process.returncode == 0, process.stderr
    assert re.search(r"test result.*'ndcg@10', \d\.\d+|test result.*'ndcg@10': \d\.\d+", process.stderr)
    for noise in ("np.float64", "Warning", "Traceback"):
        assert noise not in process.stderr


def test_flags_win_over_files_and_later_files_over_earlier(command, tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 0.5\nweight_decay: 0.25\nhidden_size: 8\n")
    (tmp_path / "b.yaml").write_text("hidden_size: 32\nweight_decay: 1e-3\n")
    command("--learning_rate=1e-3", "--loss_type=CCE-", "--mix_x=true", files="tiny.yaml a.yaml b.yaml")
    config = saved_config(tmp_path)
    assert [config[key] for key in ("learning_rate", "weight_decay", "hidden_size", "mix_x")] == [1e-3, 1e-3, 32, True]
    assert config["loss_type"] == "CCE-"


def test_model_and_dataset_from_a_file(monkeypatch, command, tmp_path):
    (tmp_path / "both.yaml").write_text("model: SASRecSCE\ndataset: tiny\n")
    monkeypatch.setattr(entry_points, "run", lambda **arguments: runs.append(arguments))
    runs = []
    command(files="tiny.yaml both.yaml")
    command("--model=GRU4Rec", "--nproc=1", files="tiny.yaml both.yaml")
    assert [(run["model"], run["dataset"]) for run in runs] == [("SASRecSCE", "tiny"), ("GRU4Rec", "tiny")]


def test_no_flags_train_sasreccce_on_ml_100k(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py"])
    arguments = cli.arguments()
    assert (arguments["model"], arguments["dataset"], arguments["nproc"]) == ("SASRecCCE", "ml-100k", 1)


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BPR"])
def test_builtin_models_run_with_the_configuration_of_stock_recbole(command, tmp_path, model):
    command(f"--model={model}")
    config = saved_config(tmp_path, model).final_config_dict
    stock = {**registration.read_yaml("tiny.yaml"), **({} if model == "BPR" else {"train_neg_sample_args": None})}
    assert config == Config(model, "tiny", config_dict=stock).final_config_dict


def test_builtin_models_get_our_defaults_of_a_data_set_below_the_users(monkeypatch, tmp_path):
    (tmp_path / "user.yaml").write_text("MAX_ITEM_LIST_LENGTH: 7\n")
    monkeypatch.setattr(
        entry_points.recbole_quick_start, "run", lambda model, dataset, config_file_list: files.append(config_file_list)
    )
    files = []
    entry_points.run("SASRec", "ml-1m", ["user.yaml"])
    entry_points.run("SASRecCCE", "ml-1m", ["user.yaml"])
    entry_points.run("SASRec", "tiny", ["user.yaml"])
    assert files == [
        [str(registration.PROPERTIES / "dataset" / "ml-1m.yaml"), "user.yaml"],
        ["user.yaml"],
        ["user.yaml"],
    ]


def test_processes_of_several_machines(monkeypatch):
    flags = ["--nproc=4", "--world_size=8", "--ip=10.0.0.1", "--port=1234", "--group_offset=4", "--gpu_id=0,1,2,3"]
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", *flags])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = cli.arguments()
    names = ("nproc", "world_size", "ip", "port", "group_offset")
    assert [arguments[name] for name in names] == [4, 8, "10.0.0.1", "1234", 4]


# Mistakes


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--learnin_rate=1e-3", r"there is no option --learnin_rate; did you mean learning_rate"),
        ("--num_negative=5", r"there is no option --num_negative; did you mean num_negatives"),
        ("--modl=SASRec", r"there is no option --modl; did you mean model"),
        ("--model=SASReC", r"--model: there is no model 'SASReC'; did you mean SASRec"),
        ("--model=SasrecCCEE", r"--model: there is no model 'SasrecCCEE'; did you mean SASRecCCE"),
        ("--model", r"argument --model: expected one argument"),
        ("--nproc=two", r"argument --nproc: 'two' is not valid; it takes an integer >= 1"),
        ("--nproc=0", r"argument --nproc: '0' is not valid; it takes an integer >= 1"),
        ("--world_size=0", r"--world_size: 0 is not valid; it takes at least nproc \+ group_offset, 1 \+ 0"),
        ("--group_offset=-1", r"argument --group_offset: '-1' is not valid; it takes an integer >= 0"),
        ("--port=80000", r"argument --port: '80000' is not valid; it takes an integer >= 1 and at most 65,535"),
        ("--model=", r"--model: there is no model ''"),
        ("--dataset=", r"--dataset: '' is not valid; it takes the name of a data set"),
        ("--nproc=2", r"--nproc=2 needs 2 GPUs, but gpu_id='' names [01]; use --gpu_id=0,1"),
        ("--epochs", r"'--epochs' is not understood; flags are written --key=value"),
        ("epochs=3", r"'epochs=3' is not understood; flags are written --key=value"),
        (
            "--loss_type=CCEE",
            r"loss_type: 'CCEE' is not valid; it takes one of auto, CE, CCE, CCE-, CE-, SCE, BCE, gBCE",
        ),
        ("--dataset=tyni", r"\[tyni\] a known dataset name"),
        ("--metrics=['Recal']", r"metrics: 'Recal' is not valid; did you mean Recall.*; it takes names of AUC, "),
        ("--topk=0", r"topk: 0 is not valid; it takes an integer >= 1"),
        ("--topk=[10, 31]", r"topk: \[10, 31\] is not valid; it takes at most 30, the number of items"),
        ("--user_inter_num_interval=[99,inf)", r"no interaction of tiny is left .*user_inter_num_interval"),
        ("--learning_rate=1e-3e", r"learning_rate: '1e-3e' is not valid; it takes a number >= 0"),
        ("--learning_rate=1e30", r"training loss is nan"),
    ],
)
def test_one_line_for_a_mistake(mistake, flag, message):
    assert re.search(message, mistake(flag))


@pytest.fixture
def saved(command, tmp_path):
    """Files of SASRecCCE and SASRecSCE on `tiny`, and the newest one of all, of SASRecCCE on `other`."""
    (tmp_path / "data" / "other").mkdir()
    (tmp_path / "data" / "other" / "other.inter").write_bytes((tmp_path / "data" / "tiny" / "tiny.inter").read_bytes())
    for index, flags in enumerate((["--model=SASRecSCE"], [], ["--dataset=other"])):
        command(*flags, f"--checkpoint_dir=run{index}")
    (tmp_path / "saved").mkdir()
    for index, name in enumerate(("SASRecSCE-a.pth", "SASRecCCE-b.pth", "SASRecCCE-c.pth")):
        (file,) = (tmp_path / f"run{index}").iterdir()
        file = file.rename(tmp_path / "saved" / name)
        os.utime(file, (1000 + index, 1000 + index))
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume=no.pth"], "--resume: there is no file 'no.pth'"),
        (["--resume="], "--resume: there is no file ''"),
        (["--resume", "--model=GRU4Rec"], "--resume: there is no checkpoint of GRU4Rec on tiny in 'saved'"),
        (
            ["--resume", "--model=SASRecSCE", "--dataset=other"],
            "--resume: there is no checkpoint of SASRecSCE on other in 'saved'",
        ),
        (
            ["--resume=saved/SASRecSCE-a.pth"],
            "--resume: saved/SASRecSCE-a.pth is a checkpoint of model SASRecSCE, not of SASRecCCE",
        ),
        (
            ["--resume=saved/SASRecCCE-c.pth"],
            "--resume: saved/SASRecCCE-c.pth is a checkpoint of dataset other, not of tiny",
        ),
        (
            ["--resume", "--hidden_size=8"],
            "--resume: saved/SASRecCCE-b.pth is a checkpoint of hidden_size 16, not of 8",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_for_a_mistake_in_resuming(saved, mistake, flags, message):
    assert mistake(*flags).startswith(message)


def test_another_catalogue_of_the_same_name(saved, mistake, tmp_path):
    file = tmp_path / "data" / "tiny" / "tiny.inter"
    file.write_text(re.sub(r"\ti(\d+)", r"\tother\1", file.read_text()))
    assert mistake("--resume").startswith("the checkpoint was trained on another catalogue")


def test_a_truncated_file(saved, mistake):
    file = saved / "SASRecCCE-b.pth"
    file.write_bytes(file.read_bytes()[:-1000])
    for flag in ("--resume", "--resume=saved/SASRecCCE-b.pth"):
        assert mistake(flag).startswith("saved/SASRecCCE-b.pth is truncated or corrupt: delete it, and resume from")


@pytest.mark.parametrize(
    "flags", [["--resume"], ["--resume=saved/SASRecCCE-b.pth"], ["--resume", "saved/SASRecCCE-b.pth"]]
)
def test_what_is_resumed(saved, command, monkeypatch, flags):
    """The newest of the model and the data set; every process gets it, from one place."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(entry_points.recbole_quick_start, "run", lambda *names, **arguments: runs.append(arguments))
    runs = []
    command(*flags, "--nproc=2", "--gpu_id=0,1")
    assert runs[0]["nproc"] == 2
    assert runs[0]["config_dict"] == {"resume": "saved/SASRecCCE-b.pth"}


@pytest.mark.parametrize("key", config_keys.keys_of_package())
def test_one_line_for_a_wrong_value_of_each_key(mistake, key):
    wrong = 1 if key == "cache_data" else "wrong"  # which could be a folder
    message = mistake(f"--{key}={wrong}")
    assert message == f"{key}: {wrong!r} is not valid; it takes {config_keys.keys_of_package()[key].valid}"


def test_loss_of_ours_with_a_model_of_recbole(mistake):
    message = mistake("--model=SASRec", "--loss_type=CCE")
    assert message.startswith("loss_type: 'CCE' is not valid; it takes CE or BPR, RecBole's losses; SASRecCCE, ")


def test_too_few_gpus(mistake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "needs 2 GPUs, but of gpu_id='0,1' this machine has 1" in mistake("--nproc=2", "--gpu_id=0,1")


def test_a_port_that_is_taken(mistake):
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        assert mistake("--nproc=2", f"--port={port}") == f"--port: {port} is in use on localhost; choose another"
    assert mistake("--nproc=2", "--ip=256.0.0.1").startswith("--ip: '256.0.0.1' is not valid; it takes the address of")


@pytest.mark.parametrize("name", ["with space", "a=b", "2024", "1e3"])
def test_names_of_files_and_folders(command, tmp_path, name):
    """Spaces and equals signs, and numbers, which stay names."""
    (tmp_path / "data").rename(tmp_path / name)
    (tmp_path / f"{name}.yaml").write_text("hidden_size: 8\n")
    command(f"--data_path={name}", f"--checkpoint_dir={name}/saved", files=f"tiny.yaml {name}.yaml")
    (file,) = (tmp_path / name / "saved").glob("*.pth")
    assert torch.load(file)["config"]["hidden_size"] == 8


def test_a_file_of_comments_only(monkeypatch, command, tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    monkeypatch.setattr(entry_points, "run", lambda **arguments: runs.append(arguments["config_file_list"]))
    runs = []
    command(files="tiny.yaml empty.yaml")
    assert runs == [["tiny.yaml", "empty.yaml"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["recommend", "--chekpoint=x", "--output=y.csv"],
            "there is no option --chekpoint; did you mean --checkpoint or --trust_checkpoint or --trust-checkpoint?",
        ),
        (["export", "--checkpoint=x", "--ouput=y"], "there is no option --ouput; did you mean --output?"),
        (["recommend", "--checkpoint=x", "y.csv", "--output=y.csv"], "'y.csv' is not understood; flags are written "),
        (["recommend", "--checkpoint=x"], "the following arguments are required: --output"),
        (["plan", "--item=10"], "there is no option --item; did you mean --items"),
        (["compare", "--models=SASRec", "--output=o", "--epoch=3"], "there is no option --epoch; did you mean epochs"),
        (["compare", "--models=SASRec", "--output=o", "--vary=epoch:1,2"], "--vary: there is no key 'epoch'; did you"),
        (["compare", "--variant=a=SASRec,epoch=3", "--output=o"], "there is no option --epoch; did you mean epochs"),
        (["compare", "--models=SASRec", "--output=o", "--dataset="], "--dataset: '' is not valid; it takes the name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_for_a_mistake_in_a_command(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"run_recbole_cce.py: error: {message}")


def test_a_flag_twice(mistake):
    assert "duplicate" in mistake("--seed=1", "--seed=2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"--config_files: there is no file 'own\.yaml'"),
        ("a: [1, 2\nb: 3", r"--config_files: 'own\.yaml' is not YAML: .*line 2"),
        ("- 1\n- 2", r"--config_files: 'own\.yaml' holds no 'key: value' lines"),
        ("model: SASReck", r"--model: there is no model 'SASReck'; did you mean SASRec"),
        ("model:", r"--model: there is no model None"),
        ("loss_type:", r"loss_type: None is not valid; it takes one of auto, CE, CCE"),
        ("num_negative: 1", r"there is no key 'num_negative'; did you mean num_negatives"),
        ("lossType: SCE", r"there is no key 'lossType'; did you mean loss_type"),
        ("xyzzy: 1", r"there is no key 'xyzzy'$"),
        ("1: 2", r"--config_files: 'own\.yaml' holds no 'key: value' lines"),
        ("n_buckets: many", r"n_buckets: 'many' is not valid; it takes an integer >= 1 or auto"),
    ],
)
def test_configuration_files(mistake, tmp_path, text, message):
    if text is not None:
        (tmp_path / "own.yaml").write_text(text)
    assert re.search(message, mistake(files="tiny.yaml own.yaml"))


def test_a_mistake_in_a_fresh_process(tmp_path, tiny):
    (tiny / "tiny" / "tiny.inter").write_text("user_id\titem_id\ttimestamp\nu\ti\t1\n")
    process = python(SCRIPT, "--dataset=tiny", f"--data_path={tiny}", "--gpu_id=")
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    last = process.stderr.splitlines()[-1]
    assert re.match(r"run_recbole_cce\.py: error: .*tiny\.inter: the header cell 'user_id' is not 'name:type'", last)


@pytest.mark.parametrize(
    ("error", "bug"),
    [
        (
            RuntimeError,
            lambda: item_table.chunked_topk(torch.ones(2, 3), torch.ones(4, 5), 1, 2),
        ),  # torch, called by us
        (ValueError, lambda: linear_cross_entropy(torch.ones(2), torch.ones(2, 2), torch.ones(2))),  # a raise of ours
        (TypeError, lambda: evaluation.auto_chunk_items("many")),
        (ValueError, lambda: torch.optim.Adam([torch.zeros(1)], eps=-1.0)),  # a raise of torch
    ],
)
def test_bugs_keep_their_traceback(command, monkeypatch, error, bug):
    monkeypatch.setattr(entry_points, "run", lambda **arguments: bug())
    with pytest.raises(error):
        command()


# Help and doctor


def test_help_explains_the_keys_and_shows_examples(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, key in config_keys.keys_of_package().items():
        assert f"--{name}=" in text
        assert key.help in text
        assert key.valid in text
    assert "--loss_type=auto\n" in text  # the default of SASRecCCE
    examples = [line.split("  ")[1] for line in text.splitlines() if line.startswith("  run_recbole_cce.py")]
    assert len(examples) >= 5
    for example in examples:
        command = example.split()[1] if len(example.split()) > 1 else None
        if command in cli.COMMANDS:
            cli.COMMANDS[command][0]().values(example.split()[2:])
            continue
        for flag in re.findall(r"--\w+=\S+", example):
            name = flag[2:].partition("=")[0]
            named = ("model", "dataset", "config_files", "nproc", "plugin")
            assert name in named or name in config_checks.known_keys("SASRecCCE") | config_checks.known_keys(
                "SASRecSCE"
            )


def test_doctor():
    process = python(SCRIPT, "doctor")
    assert process.returncode == 0, process.stderr
    printed = process.stdout
    for version in (torch.__version__, np.__version__, f"Python {sys.version.split()[0]}", "RecBole 1.2.1"):
        assert version in printed
    if not torch.cuda.is_available():
        assert "Triton kernels cannot run: they need an NVIDIA GPU" in printed
    active, _, rest = printed.partition("Active repairs")[2].partition("Not needed here:")
    for repair in repairs.REPAIRS:
        name = repair.__name__
        assert (f"  {name}: " in active) == (name in repairs.ACTIVE)
        assert (name in rest.splitlines()[0]) == (name not in repairs.ACTIVE)
    for issue in ("#1866", "#1735", "mixed precision"):
        assert issue in rest


# Downloads


def test_data_sets_are_downloaded_by_name(command, tmp_path, monkeypatch):
    """RecBole's table of addresses, its zip files and its names inside them; the server is one of this machine."""
    rng = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"u{user}\ti{rng.integers(12)}\t5\t{step}" for user in range(20) for step in range(10)]
    address = registration.read_yaml(Path(recbole.__file__).parent / "properties" / "dataset" / "url.yaml")["ml-1m"]
    served = tmp_path / "served" / address.partition("://")[2].partition("/")[2]
    served.parent.mkdir(parents=True)
    with zipfile.ZipFile(served, "w") as archive:
        archive.writestr(f"{served.stem}.inter", "\n".join(lines) + "\n")

    handler = functools.partial(Quiet, directory=tmp_path / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    local = f"http://127.0.0.1:{server.server_port}/"
    urlopen = url.ur.urlopen
    monkeypatch.setattr(url.ur, "urlopen", lambda at: urlopen(re.sub(r"https?://[^/]+/", local, at)))
    try:
        command("--dataset=ml-1m", f"--data_path={tmp_path}/new")
    finally:
        server.shutdown()
        server.server_close()
    assert (tmp_path / "new" / "ml-1m" / "ml-1m.inter").read_text().splitlines() == lines
    config = saved_config(tmp_path)
    assert config["dataset"] == "ml-1m"
    assert config["user_inter_num_interval"] == "[5,inf)"  # properties/dataset/ml-1m.yaml


def test_a_server_that_does_not_answer(mistake, monkeypatch, tmp_path):
    def refuse(address):
        raise url.ur.URLError("Connection refused")

    monkeypatch.setattr(url.ur, "urlopen", refuse)
    assert "Connection refused" in mistake("--dataset=ml-1m", f"--data_path={tmp_path}/new")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass
