"""tune: a search on `tiny` that is interrupted and goes on, its numbers against RecBole, its budget, mistakes."""

from __future__ import annotations

import base64
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from recbole.quick_start import quick_start as recbole_quick_start
from recbole.quick_start import run_recbole
from recbole.trainer import Trainer

pytest.importorskip("optuna")

from recbole_cce import cli
from recbole_cce.commands.compare.trial import Trial
from recbole_cce.commands.tune import command, report, search
from recbole_cce.commands.tune import trial as processes
from recbole_cce.commands.tune.search import Search
from recbole_cce.commands.tune.space import Parameter
from recbole_cce.commands.tune.study import Study
from recbole_cce.commands.tune.trial import Place, Progress
from recbole_cce.files import locked
from tests.commands.compare.test_compare import make_folder
from tests.process import SCRIPT, python_path

SPACE = "learning_rate choice [0.01]\nn_heads choice [1, 3]\n"  # three heads do not divide 16
FLAGS = ["--dataset=tiny", "--config_files=tiny.yaml", "--repeat_bias=none", "--parallel=2", "--output=tuned"]
COMMANDS = {
    "SASRecCCE": [*FLAGS, "--space=hyper.test", "--seed=7"],
    "GRU4Rec": [*FLAGS[:2], "--output=tuned", "--space=gru.yaml", "--train_neg_sample_args=None"],
}
TRIED = {"SASRecCCE": [("0.0005", "2"), ("0.01", "1"), ("0.01", "3")], "GRU4Rec": [("0.001",), ("0.01",)]}


def start(folder, *flags):
    with open(folder / "printed.txt", "w") as printed:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), "tune", *flags],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(SCRIPT.parent)},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ended(folder):
    """Number -> result of the trials that have."""
    files = {int(file.parent.name): json.loads(file.read_text()) for file in folder.glob("tuned/trials/*/result.json")}
    return {number: result for number, result in sorted(files.items()) if "ended" in result}


def fill(folder):
    make_folder(folder)
    (folder / "hyper.test").write_text(SPACE)
    (folder / "gru.yaml").write_text("choice: {learning_rate: [0.01]}")


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path)
    return tmp_path


@pytest.fixture(scope="module", params=COMMANDS)
def tuned(request, tmp_path_factory):
    """A search that is interrupted as soon as a trial has ended, then run until every setting has been tried."""
    folder = tmp_path_factory.mktemp("tune")
    fill(folder)
    flags = [f"--model={request.param}", *COMMANDS[request.param]]
    process = start(folder, *flags, "--parallel=1")  # so that others are still to come when the first one has ended
    while not ended(folder):
        assert process.poll() is None, (folder / "printed.txt").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: all processes are interrupted
    code = process.wait()
    first = SimpleNamespace(
        code=code, printed=(folder / "printed.txt").read_text(), results=ended(folder), left=left(folder)
    )
    code = start(folder, *flags).wait()
    printed = (folder / "printed.txt").read_text()
    assert code == 0, printed
    return SimpleNamespace(model=request.param, folder=folder, first=first, printed=printed, left=left(folder))


def left(folder):
    """Processes that still work there after a while."""
    end = time.time() + 10
    while found := of_folder(folder):
        if time.time() > end:
            break
        time.sleep(0.05)
    return found


def of_folder(folder):
    """Processes that work there."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found += [link] if os.readlink(link) == str(folder) else []
        except OSError:
            continue
    return found


def rows(folder):
    with open(folder / "tuned" / "table.csv", newline="") as file:
        return {row["trial"].partition(" ")[0]: row for row in csv.DictReader(file)}


# A search


def test_an_interrupted_search_goes_on(tuned):
    first, after = tuned.first, ended(tuned.folder)
    assert first.code == 130 and first.left == tuned.left == []
    assert first.printed.splitlines()[-1] == "interrupted; the same command goes on where it stopped"
    assert "Traceback" not in first.printed and "resource_tracker" not in first.printed
    assert {number: after[number] for number in first.results} == first.results
    keys = ("learning_rate", "n_heads")
    settings = [tuple(row[key] for key in keys if key in row) for row in rows(tuned.folder).values()]
    assert sorted(settings) == TRIED[tuned.model]


def test_a_trial_that_fails_says_why_and_the_search_goes_on(tuned):
    states = [row["state"] for row in rows(tuned.folder).values()]
    failed = [state for state in states if state not in ("finished", "pruned")]
    assert len(failed) == (tuned.model == "SASRecCCE")
    assert all("The hidden size (16) is not a multiple of the number of attention heads (3)" in one for one in failed)


def test_table_is_what_the_trials_had(tuned):
    table, results = rows(tuned.folder), ended(tuned.folder)
    best = {
        number: max((point["score"] for point in result["curve"]), default=None) for number, result in results.items()
    }
    assert {int(number) for number in table} == set(results)
    for number, row in table.items():
        value, result = best[int(number)], results[int(number)]
        assert row["validation ndcg@10"] == ("" if value is None else f"{value:.4f}")
        assert int(row["epochs"]) == len(result["curve"])
        if value is not None:
            assert result["curve"][int(row["best epoch"])]["score"] == value
    values = [float(row["validation ndcg@10"] or -1) for row in table.values()]
    assert values == sorted(values, reverse=True)
    assert values[0] >= float(table["0"]["validation ndcg@10"])  # never worse than the defaults
    assert all(
        point["score"] == pytest.approx(point["valid"]["ndcg@10"]) for r in results.values() for point in r["curve"]
    )


def test_best_yaml_is_what_the_best_trial_was(tuned, monkeypatch):
    """The train command has the same validation and, from a run of its own, the same test."""
    monkeypatch.chdir(tuned.folder)
    file = Path("tuned/best.yaml")
    settings, (number, row) = yaml.safe_load(file.read_text()), next(iter(rows(tuned.folder).items()))
    assert (settings["model"], settings["dataset"]) == (tuned.model, "tiny")
    again = run_recbole(settings["model"], settings["dataset"], [str(file)], {"show_progress": False, "state": "ERROR"})
    assert f"{again['best_valid_score']:.4f}" == row["validation ndcg@10"]
    tested = json.loads(Path("tuned/test.json").read_text())
    assert tested["trial"] == int(number)
    assert tested["test"] == again["test_result"]
    assert f"ndcg@10 {tested['test']['ndcg@10']}" in tuned.printed
    assert str(file) in tuned.printed


def test_the_test_is_the_last_thing_that_is_done(tuned):
    """The log of a trial ends before a test; one checkpoint is left, that of the best."""
    number = next(iter(rows(tuned.folder)))
    for folder in (tuned.folder / "tuned" / "trials").iterdir():
        assert "test result" not in (folder / "log.txt").read_text()
        assert (folder / "test.txt").exists() == (int(folder.name) == int(number))
        assert len(list(folder.glob("*.pth"))) == (int(folder.name) == int(number))


def test_the_page_loads_nothing(tuned):
    page = (tuned.folder / "tuned" / "report.html").read_text()
    assert not re.search(r"https?://|<link|<script|@import|url\(", page)
    images = [
        base64.b64decode(one.removeprefix("data:image/png;base64,")) for one in re.findall(r'src="([^"]+)"', page)
    ]
    assert images == [(tuned.folder / "tuned" / f"{name}.png").read_bytes() for name in ("progress", "curves")]
    assert f"tune --model={tuned.model}" in page


def test_a_search_that_has_ended_is_not_repeated_and_another_is_refused(tuned, monkeypatch, capsys):
    monkeypatch.chdir(tuned.folder)
    monkeypatch.setattr(search, "new_worker", lambda: pytest.fail("a process was started"))
    flags = [f"--model={tuned.model}", *COMMANDS[tuned.model]]
    before = {file: file.read_bytes() for file in Path("tuned").glob("table.*")}

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "tune", *flags, *more])
        cli.main()

    run()
    assert {file: file.read_bytes() for file in before} == before
    for more, message in {
        "--epochs=4": r"'tuned' is of a search with epochs: 3, not 4; it takes another folder",
        "--hidden_size=8": r"with hidden_size: 16, not 8",
    }.items():
        with pytest.raises(SystemExit):
            run(more)
        assert re.search(message, capsys.readouterr().err)
    with locked(Path("tuned")), pytest.raises(SystemExit):
        run()
    assert re.search(
        r"error: --output: 'tuned' is that of another tune that is running \(process", capsys.readouterr().err
    )


# One trial


@pytest.fixture
def one(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "run").mkdir()
    settings = {"checkpoint_dir": str(folder / "run"), "show_progress": "False", "state": "ERROR"}
    return Trial("1", "SASRecCCE", "tiny", 2020, ("tiny.yaml",), settings, None, str(folder / "run"))


def go_on(validations, value, reserve):
    return False


def test_the_test_split_is_read_once(one, monkeypatch):
    """By the test of the best, not by a trial."""
    reads, evaluate, prepare = [], Trainer.evaluate, recbole_quick_start.data_preparation

    class Test:
        def __init__(self, loader):
            self.loader = loader

        def __getattr__(self, name):
            return getattr(self.loader, name)

        def __iter__(self):
            reads.append(self.loader)
            return iter(self.loader)

    def with_watched_test(*arguments):
        *others, test = prepare(*arguments)
        return *others, Test(test)

    monkeypatch.setattr(recbole_quick_start, "data_preparation", with_watched_test)
    processes.train(Progress(one, Place(math.inf, 1, 1), go_on))
    assert one.result()["state"] == "finished" and len(one.result()["curve"]) == 3 and reads == []
    assert "test" not in one.result()
    tested = []
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self, data, *a, **k: tested.append(data) or evaluate(self, data, *a, **k)
    )
    found = processes.tested(one)
    assert len(tested) == 1 and set(found["test"]) == set(one.result()["curve"][0]["valid"])


def test_the_budget_ends_a_trial_in_time_for_the_test(one):
    end = time.time() + processes.TABLE_SECONDS + 4
    long = replace(one, settings={**one.settings, "epochs": 10**6, "stopping_step": 10**6})
    processes.train(Progress(long, Place(end, 1, 1), go_on))
    result = one.result()
    assert result["state"] == "stopped" and result["curve"]
    assert time.time() < end - processes.TABLE_SECONDS
    (file,) = (one_file for one_file in Path(one.folder).glob("*.pth"))
    assert torch.load(file)["epoch"] == report.best(result)["epoch"]
    assert search.value(result) == max(point["score"] for point in result["curve"])


def test_a_trial_that_is_behind_ends_with_its_best_epoch(one):
    asked = []

    def is_behind(validations, value, reserve):
        asked.append((validations, value))
        return validations == 2

    processes.train(Progress(one, Place(math.inf, 1, 1), is_behind))
    result = one.result()
    scores = [point["score"] for point in result["curve"]]
    assert result["state"] == "pruned" and len(scores) == 2
    assert asked == [(1, scores[0]), (2, max(scores))]


def test_a_trial_without_memory_says_so(one, monkeypatch):
    def no_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 PiB")

    monkeypatch.setattr(Progress, "train_epoch", no_memory)
    processes.train(Progress(one, Place(math.inf, 1, 1), go_on))
    assert one.result()["state"] == "out of memory" and "1.00 PiB" in one.result()["reason"]
    assert search.value(one.result()) is None


# The search, with trials that compute nothing


class Thread:
    """In the place of a process: it does its job in this one, and ends with its channel."""

    def __init__(self):
        self.channel, theirs = Pipe()
        self.sentinel, self.alive = Pipe(duplex=False)
        self.exitcode = None
        self.pid = threading.Thread(target=self.work, args=(theirs,), daemon=True)
        self.pid.start()

    def work(self, channel):
        try:
            processes.serve(channel)
            self.exitcode = 0
        except (EOFError, OSError):
            self.exitcode = -signal.SIGKILL
        self.alive.close()

    def kill(self):
        self.channel.close()

    def join(self):
        self.pid.join()


def fake_run(channel, one, place):
    """Trains to a quality that the setting `learning_rate` decides, in epochs of .02 s."""
    rate = one.settings.get("learning_rate", 0.5)
    seconds = one.settings.get("seconds", 0.02)
    result = one.result() | {"fit_begun": time.time()}
    if rate == 0.9:
        one.save(result | {"state": "out of memory", "reason": "no room"})
        return
    for epoch in range(20):
        for _ in range(max(1, round(seconds / 0.02))):
            time.sleep(0.02)
            if channel.closed or channel.poll():
                raise EOFError
        score = (1 - abs(rate - 0.3)) * (1 - 0.5 ** (epoch + 1))
        valid = {"ndcg@10": score}
        result["curve"].append(
            {"epoch": epoch, "best": True, "score": score, "valid": valid, "seconds": 0.02, "train_seconds": 0.02}
        )
        if time.time() > place.end - 0.2:
            one.save(result | {"state": "stopped"})
            return
        channel.send((epoch + 1, score, 0.2))
        if channel.recv():
            one.save(result | {"state": "pruned"})
            return
    one.save(result | {"state": "finished"})


def failing_run(channel, one, place):
    one.save(one.result() | {"state": "failed", "reason": "ValueError: no such thing"})


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes searches of one key."""
    monkeypatch.setattr(processes, "run", fake_run)
    monkeypatch.setattr(search, "new_worker", lambda: (lambda thread: search.Worker(thread, thread.channel))(Thread()))
    monkeypatch.setattr(search, "TABLE_SECONDS", 0.1)

    def make(parameter, budget, parallel=2, **settings):
        study = Study(tmp_path / "journal.log", [parameter], {"learning_rate": 0.5}, seed=1, bigger=True, first_rung=2)
        base = Trial("", "SASRecCCE", "tiny", 2020, (), settings, None, "")
        return Search(study, base, tmp_path, parallel, ["0", "1"], time.time(), budget)

    return make


def test_search_of_a_budget(fake, capsys):
    found = fake(Parameter("learning_rate", low=0.0, high=0.8), 4.0)
    begun = time.time()
    found.run()
    found.close()
    assert time.time() - begun < 5
    states = {result["state"] for result in found.results.values()}
    assert {"finished", "pruned"} <= states <= {"finished", "pruned", "stopped"}
    assert len(found.results) >= 8
    values = found.study.values()
    assert abs(values[found.best]["learning_rate"] - 0.3) < 0.1 < abs(values[0]["learning_rate"] - 0.3)
    assert {result["settings"]["gpu_id"] for result in found.results.values()} == {"0", "1"}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(found.results)
    assert all(
        re.match(
            r"trial \d+: 0\.\d{4}, \w+ after \d+ epochs, \d+ s; .*learning_rate .*; best: 0\.\d+, trial \d+; \ds left",
            line,
        )
        for line in lines
    )
    again = fake(Parameter("learning_rate", low=0.0, high=0.8), 4.0)
    again.run()
    again.close()
    assert again.results == found.results  # nothing is left of the budget
    stopped = [number for number, result in found.results.items() if result["state"] == "stopped"]
    more = fake(Parameter("learning_rate", low=0.0, high=0.8), 6.5)
    more.run()
    more.close()
    assert all(more.results[number]["begun"] >= 4.0 for number in stopped)  # run again
    assert all(more.results[number] == one for number, one in found.results.items() if number not in stopped)
    assert len(more.results) > len(found.results)
    images = report.draw(more, "ndcg@10")
    assert list(images) == ["progress", "curves", "keys"]
    assert all(image.startswith(b"\x89PNG") for _, image in images.values())
    lines = report.progress(more)
    assert lines["best of all"][0].y == sorted(lines["best of all"][0].y)
    assert lines["best of all"][0].y[-1] == search.value(more.results[more.best])
    assert lines["defaults"][0].y[-1] == search.value(more.results[0])
    assert lines["best of all"][0].x == sorted(lines["best of all"][0].x) and lines["best of all"][0].x[-1] < 6.5
    assert sum(map(len, report.curves(more).values())) == len(more.results)


def test_what_does_not_end_in_time_is_ended(fake, capsys):
    found = fake(Parameter("learning_rate", low=0.0, high=0.8), 1.0, seconds=5)
    begun = time.time()
    found.run()
    found.close()
    assert time.time() - begun < 3
    assert {result["state"] for result in found.results.values()} == {"late"} and found.best is None
    assert "trial 0: late, 1 s (an epoch did not end within the budget)" in capsys.readouterr().err


def test_out_of_memory_is_a_trial_and_the_search_goes_on(fake, capsys):
    found = fake(Parameter("learning_rate", (0.9, 0.4)), 60.0)
    found.run()
    found.close()
    states = {
        found.study.values()[number]["learning_rate"]: result["state"] for number, result in found.results.items()
    }
    assert states == {0.5: "finished", 0.9: "out of memory", 0.4: "finished"}
    assert re.search(r"trial \d: out of memory, 0 s \(no room\); learning_rate 0.9", capsys.readouterr().err)
    assert found.study.values()[found.best]["learning_rate"] == 0.4


def test_trials_that_all_fail_end_the_search(fake, monkeypatch):
    monkeypatch.setattr(processes, "run", failing_run)
    found = fake(Parameter("learning_rate", low=0.0, high=0.8), 60.0)
    with pytest.raises(search.UserError, match="the first 5 trials failed, the last: ValueError: no such thing"):
        found.run()
    found.close()


# What a user can get wrong


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget=10"], r"--budget: '10' is not valid; it takes a time such as 90s, 10m, 2h or 1h30m"),
        (["--budget=0m"], r"--budget: '0m' is not valid"),
        (["--budget=m10"], r"--budget: 'm10' is not valid"),
        (["--parallel=0"], r"argument --parallel: '0' is not valid; it takes an integer >= 1"),
        (["--model=SASRecCE"], r"--model: there is no model 'SASRecCE'; did you mean SASRec"),
        (["--dataset=tyni"], r"\[tyni\] a known dataset name"),
        (["--config_files=no.yaml"], r"--config_files: there is no file 'no.yaml'"),
        (["--learnin_rate=1"], r"there is no option --learnin_rate; did you mean learning_rate"),
        (["--epochs=1", "--epochs=2"], r"--epochs is there twice, as '1' and '2'"),
        (["--learning_rate=-1"], r"learning_rate: -1 is not valid; it takes a number >= 0"),
        (["--eval_step=0"], r"eval_step: 0 is not valid; it takes an integer >= 1"),
        (["--valid_metric=MRR@10"], r"valid_metric: 'MRR@10' is not among metrics and topk"),
        (["--eval_args={'split': {'LS': 'test_only'}, 'order': 'TO'}"], r"eval_args: .* a split with a validation"),
        (["--eval_args={'split': {'RS': [0.9, 0, 0.1]}, 'order': 'TO'}"], r"eval_args: .* a split with a validation"),
        (["--topk=[31]", "--valid_metric=NDCG@31"], r"topk: \[31\] is not valid; .* at most 30"),
        (["--space=no.test"], r"--space: there is no file 'no.test'"),
        (
            ["--space=wrong: learnin_rate uniform 0,1"],
            r"--space: there is no key 'learnin_rate'; did you mean learning_r",
        ),
        (
            ["--space=wrong: hidden_dropout_prob uniform 0,2"],
            r"--space: hidden_dropout_prob: 2.0 is not valid; it takes a",
        ),
        (["--space=wrong: n_layers uniform 1,4"], r"--space: n_layers: 1.0 is not valid; it takes an integer >= 1"),
        (
            ["--space=wrong: loss_type choice ['CCEE']"],
            r"--space: loss_type: 'CCEE' is not valid; it takes one of auto",
        ),
        (
            ["--space=wrong: metrics choice ['MRR','NDCG']"],
            r"--space: 'metrics' cannot be searched: it takes one value",
        ),
        (["--space=wrong: seed choice [1,2]"], r"--space: 'seed' cannot be searched"),
        (["--model=Cooccurrence"], r"--space: Cooccurrence has no key that is searched without one"),
        (["--output=tiny.yaml"], r"--output: 'tiny.yaml' is a file; it takes a folder"),
        (["--output=data"], r"--output: 'data' holds other files; it takes a new folder, or one of tune's"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_for_a_mistake(folder, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(search, "new_worker", lambda: pytest.fail("a process was started"))
    flags = list(flags)
    if "wrong: " in flags[0]:
        (folder / "wrong").write_text(flags[0].partition("wrong: ")[2])
        flags[0] = "--space=wrong"
    defaults = ["--dataset=tiny", "--config_files=tiny.yaml", "--output=tuned"]
    names = {flag.partition("=")[0] for flag in flags}
    defaults = [flag for flag in defaults if flag.partition("=")[0] not in names]
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "tune", *defaults, *flags])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert re.match("run_recbole_cce.py: error: .*" + message, error), error
    assert "\n" not in error
    assert not (folder / "tuned").exists()


def test_without_optuna(folder, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "tune", "--dataset=tiny", "--output=tuned"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "error: tune takes optuna and matplotlib: pip install optuna matplotlib" in capsys.readouterr().err
