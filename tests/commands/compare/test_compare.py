"""compare: a killed and resumed study on `tiny`, its numbers against RecBole and SciPy, failures, limits, mistakes.

Metrics of users are computed here from the scores of the checkpoints, p-values from those.
"""

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
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataset.dataset import Dataset
from recbole.quick_start import load_data_and_model, run_recbole
from scipy import stats

from recbole_cce import cli
from recbole_cce.commands.compare import figures, report, runs, trial
from recbole_cce.commands.compare.trial import Trial, Watch
from recbole_cce.plugin import reading
from tests.conftest import write_inter
from tests.process import SCRIPT, python_path

COMMAND = ["--models=SASRec,SASRecCCE", "--dataset=tiny", "--config_files=tiny.yaml", "--seeds=2020,2021"]
COMMAND += ["--learning_rate=0.01", "--repeat_bias=none", "--parallel=2", "--output=study"]

NO_MEMORY = """
import torch

from recbole_cce import register_model
from recbole_cce.models.sasrec import SASRecCCE
from recbole_cce.plugin import registration


class NoMemory(SASRecCCE):
    def calculate_loss(self, interaction):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 PiB")


register_model(NoMemory, defaults=registration.MODELS["SASRecSCE"])
"""

RUN = """
import no_memory
from recbole_cce.cli import main

if __name__ == "__main__":
    main()
"""


def start(folder, script, *flags):
    with open(folder / "printed.txt", "w") as printed:
        return subprocess.Popen(
            [sys.executable, str(script), "compare", *flags],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(SCRIPT.parent)},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def results(folder, output="study"):
    files = sorted((folder / output / "runs").glob("*/result.json"))
    return {file.parent.name.rpartition("-")[0]: json.loads(file.read_text()) for file in files}


def make_folder(folder):
    """A working folder; the times are exact in float32, so that RecBole's own order is the right one."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", 100 * step + user)
        for user in range(40)
        for step, item in enumerate(rng.integers(0, 30, rng.integers(4, 13)))
    ]
    write_inter(folder / "data", "tiny", "user_id:token\titem_id:token\ttimestamp:float", rows)
    config = {
        "data_path": "data",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "gpu_id": "",
        "use_gpu": False,
        "epochs": 3,
        "hidden_size": 16,
        "inner_size": 32,
        "MAX_ITEM_LIST_LENGTH": 8,
        "train_batch_size": 16,
        "metrics": ["NDCG", "Hit", "ItemCoverage"],
        "topk": [5, 10],
        "valid_metric": "NDCG@10",
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """COMMAND, killed as soon as a run has finished, then run to its end; what was there at the kill is `killed`."""
    folder = tmp_path_factory.mktemp("compare")
    make_folder(folder)
    process = start(folder, SCRIPT, *COMMAND)
    while not any(result["state"] == "finished" for result in results(folder).values()):
        assert process.poll() is None, (folder / "printed.txt").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    times = {file: file.stat().st_mtime_ns for file in folder.glob("study/runs/*/result.json")}
    killed = results(folder)
    runs = [link for link in Path("/proc").glob("[0-9]*/cwd") if points_to(link, folder)]
    assert start(folder, SCRIPT, *COMMAND).wait() == 0, (folder / "printed.txt").read_text()
    leftover = [link for link in runs if points_to(link, folder)]
    return {"folder": folder, "killed": killed, "times": times, "leftover": leftover}


def points_to(link, folder):
    try:
        return os.readlink(link) == str(folder)
    except OSError:
        return False


def table(folder, output="study"):
    with open(folder / output / "table.csv", newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def ndcg(model_file, k=10):
    """User -> NDCG@k of the one held-out item, from all scores of the model of a checkpoint."""
    _, model, _, _, _, test = load_data_and_model(model_file)
    model.eval()
    values = {}
    with torch.no_grad():
        for interaction, _, _, positive in test:
            scores = model.full_sort_predict(interaction).view(len(interaction), -1)
            scores[:, 0] = -torch.inf
            rank = (scores > scores.gather(1, positive[:, None])).sum(1).tolist()
            gains = [1 / math.log2(place + 2) if place < k else 0.0 for place in rank]
            values.update(zip(interaction["user_id"].tolist(), gains, strict=True))
    return values


# A study


def test_a_killed_command_goes_on_where_it_stopped(study):
    killed = study["killed"]
    assert {result["state"] for result in killed.values()} - {"finished"} <= {"unfinished"}
    assert 1 <= sum(result["state"] == "finished" for result in killed.values()) < 4
    assert study["leftover"] == []  # runs end with their command
    after = results(study["folder"])
    assert [result["state"] for result in after.values()] == ["finished"] * 4
    for file, changed in study["times"].items():
        name = file.parent.name.rpartition("-")[0]
        assert (file.stat().st_mtime_ns == changed) == (killed[name]["state"] == "finished"), name


def test_numbers_are_those_of_recbole_run_directly(study, monkeypatch):
    monkeypatch.chdir(study["folder"])
    for name, result in results(study["folder"]).items():
        model, seed = name.split("-")
        settings = {"seed": int(seed), "learning_rate": 0.01, "show_progress": False, "state": "ERROR"}
        settings["repeat_bias"] = "none"
        direct = run_recbole(model, "tiny", ["tiny.yaml"], settings)
        assert result["test"] == direct["test_result"], name
        best = [point for point in result["curve"] if point["best"]][-1]
        assert best["valid"] == direct["best_valid_result"], name
        assert len(result["curve"]) == 3


def test_table_against_the_results_of_the_runs(study):
    rows, runs = table(study["folder"]), results(study["folder"])
    assert list(rows) == ["SASRec", "SASRecCCE"]
    for model, row in rows.items():
        group = [runs[f"{model}-{seed}"] for seed in (2020, 2021)]
        best = [[point for point in one["curve"] if point["best"]][-1] for one in group]
        expected = {name: [one["test"][name] for one in group] for name in group[0]["test"]}
        assert "itemcoverage@10" in expected
        expected["best epoch"] = [point["epoch"] for point in best]
        expected["s to best"] = [point["train_seconds"] for point in best]
        expected["s to best, with validation"] = [point["seconds"] for point in best]
        steps = [np.diff([0, *(point["train_seconds"] for point in one["curve"])]) for one in group]
        expected["s / epoch"] = [sorted(step)[1] for step in steps]
        expected["parameters"] = [one["parameters"] for one in group]
        for title, values in expected.items():
            mean = sum(values) / 2
            deviation = math.sqrt(sum((value - mean) ** 2 for value in values))
            assert float(row[title]) == pytest.approx(mean), title
            assert float(row[f"{title}, deviation"]) == pytest.approx(deviation, abs=1e-12), title
        assert row["GiB, training"] == row["GiB, peak"] == ""
        assert row["runs"] == "2 finished"
        sizes = torch.load(next((study["folder"] / "study" / "runs").glob(f"{model}-2020-*/*.pth")))["state_dict"]
        learned = sum(value.numel() for key, value in sizes.items() if not key.startswith("loss"))
        assert float(row["parameters"]) == learned


def test_p_values_against_scipy(study, monkeypatch):
    monkeypatch.chdir(study["folder"])
    per_user = {}
    for model in ("SASRec", "SASRecCCE"):
        seeds = [ndcg(next(Path("study/runs").glob(f"{model}-{seed}-*/*.pth"))) for seed in (2020, 2021)]
        per_user[model] = [sum(one[user] for one in seeds) / 2 for user in sorted(seeds[0])]
        for seed, values in zip((2020, 2021), seeds, strict=True):
            (file,) = Path("study/runs").glob(f"{model}-{seed}-*/users.npz")
            saved = dict(np.load(file))
            assert saved["user"].tolist() == sorted(values)
            np.testing.assert_allclose(saved["ndcg@10"], [values[user] for user in sorted(values)], rtol=1e-6)
            recorded = results(study["folder"])[f"{model}-{seed}"]["test"]["ndcg@10"]
            assert np.mean(list(values.values())) == pytest.approx(recorded, abs=5.1e-5)
    row = table(study["folder"])["SASRecCCE"]
    difference = np.array(per_user["SASRecCCE"]) - np.array(per_user["SASRec"])
    assert float(row["difference"]) == pytest.approx(difference.mean())
    assert float(row["p"]) == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)
    assert table(study["folder"])["SASRec"]["p"] == ""


def numbers(cell):
    """'0.1 ± 0.2' -> [0.1, 0.2]"""
    return [float(part) for part in re.split(r" ± | \$\\pm\$ ", cell) if part != "-"]


def test_markdown_and_latex_hold_the_numbers_of_the_csv(study):
    folder = study["folder"] / "study"
    markdown = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (folder / "table.md").read_text().splitlines()[:4]]
    latex = [line for line in (folder / "table.tex").read_text().splitlines() if line.endswith(r"\\")]
    latex = [line.removesuffix(r"\\").replace(r"\_", "_").split(" & ") for line in latex]
    rows = table(study["folder"])
    for form in ([markdown[0], *markdown[2:]], latex):
        header, *lines = [[cell.strip() for cell in line] for line in form]
        assert header == [title for title in rows["SASRec"] if not title.endswith(", deviation")]
        assert len(lines) == 2
        for line in lines:
            row = rows[line[0]]
            assert line[-1] == row["runs"]
            for title, cell in zip(header[1:-1], line[1:-1], strict=True):
                full = [float(row[part]) for part in (title, f"{title}, deviation") if row[part]]
                shown = numbers(cell)
                assert len(shown) == len(full) or full[1:] == [0], title
                unit = 10.0 ** -len(re.split(r"[ e]", cell)[0].partition(".")[2])
                for short, exact in zip(shown, full, strict=False):
                    assert short == pytest.approx(exact, abs=0.51 * unit, rel=0.05 if title == "p" else 0), title
    assert (folder / "table.tex").read_text().count(r"\begin{tabular}{l" + "r" * (len(header) - 2) + "l}") == 1


def test_the_page_is_complete_and_loads_nothing(study):
    folder = study["folder"] / "study"
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?://|<link|<script|@import|url\(", page)
    sources = re.findall(r'src="([^"]+)"', page)
    names = ["quality_time.png", "curves_seconds.png", "curves_epochs.png"]  # no GPU: none of memory
    assert sorted(file.name for file in folder.glob("*.png")) == sorted(names)
    images = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert images == [(folder / name).read_bytes() for name in names]
    assert all(image.startswith(b"\x89PNG") for image in images)
    for row in table(study["folder"]).values():
        assert f"<td>{row['model']}</td>" in page
        assert f"{float(row['ndcg@10']):.4f}" in page
    for text in (
        f"torch {torch.__version__}",
        "<td>learning_rate</td><td>0.01</td>",
        "compare --models=SASRec,SASRecCCE",
    ):
        assert text in page, text
    printed = (study["folder"] / "printed.txt").read_text()
    assert (folder / "table.md").read_text() in printed
    assert len(re.findall(r"SASRec(CCE)?, seed 202[01]: finished, test ndcg@10 0\.\d+, 3 epochs", printed)) >= 1


def test_runs_are_spread_over_gpus(folder):
    """Each has one GPU to itself, as there are as many of them as runs at a time."""
    flags = ["--models=SASRecCCE", "--dataset=tiny", "--config_files=tiny.yaml", "--epochs=1", "--seeds=1,2,3"]
    process = start(folder, SCRIPT, *flags, "--gpu_id=4,7", "--parallel=2", "--output=study")
    assert process.wait() == 0, (folder / "printed.txt").read_text()
    runs = results(folder).values()
    assert [run["state"] for run in runs] == ["finished"] * 3
    assert sorted(run["config"]["gpu_id"] for run in list(runs)[:2]) == ["4", "7"]
    assert {run["config"]["gpu_id"] for run in runs} == {"4", "7"}
    assert [run["parallel"] for run in runs] == [1, 1, 1]
    assert "shared the device" not in (folder / "printed.txt").read_text()


def test_out_of_memory_and_failures_are_rows(study):
    """Beside a finished run that is not repeated; what had no room beside another run is tried again alone."""
    folder = study["folder"]
    (folder / "no_memory.py").write_text(NO_MEMORY)
    (folder / "run.py").write_text(RUN)
    before = {file: file.stat().st_mtime_ns for file in folder.glob("study/runs/*/result.json")}
    flags = [flag for flag in COMMAND if not flag.startswith(("--models", "--seeds"))]
    flags += ["--models=SASRec,NoMemory", "--variant=broken=SASRecCCE,n_heads=3", "--seeds=2020"]
    flags += ["--variant=bare=SASRec,TIME_FIELD=time"]
    kept = {
        name: (folder / "study" / name).read_bytes() for name in ("table.csv", "table.md", "table.tex", "report.html")
    }
    process = start(folder, folder / "run.py", *flags)
    try:
        assert process.wait() == 0, (folder / "printed.txt").read_text()
        assert {file: file.stat().st_mtime_ns for file in before} == before
        rows, page = table(folder), (folder / "study" / "report.html").read_text()
        assert [row["runs"] for row in rows.values()][:2] == ["1 finished", "1 out of memory"]
        reason = "The hidden size (16) is not a multiple of the number of attention heads (3)"
        assert rows["broken"]["runs"].startswith("1 failed: ValueError: ") and reason in rows["broken"]["runs"]
        assert rows["bare"]["runs"].startswith("1 failed: UserError: TIME_FIELD: 'time' is not a column of ")
        assert rows["NoMemory"]["ndcg@10"] == rows["broken"]["ndcg@10"] == ""
        assert "<td>out of memory</td>" in page and reason in page
        assert results(folder)["NoMemory-2020"]["parallel"] == 1
        printed = (folder / "printed.txt").read_text()
        assert printed.count("NoMemory, seed 2020: out of memory") == 2
        assert printed.count("broken, seed 2020: failed: ValueError") == 1
    finally:
        for name, content in kept.items():
            (folder / "study" / name).write_bytes(content)


def damaged(kind, content):
    """result.json of a finished run, or its users.npz, as a kill, a full disk or an editor leaves it."""
    result = json.loads(content)
    return {
        "half": content[: len(content) // 2],
        "empty": b"",
        "zeros": bytes(len(content)),
        "text": b"\xff\xfe",
        "list": b"[]",
        "nothing": b"{}",
        "state alone": json.dumps({"state": "finished"}).encode(),
        "no test": json.dumps(result | {"test": None}).encode(),
        "a point": json.dumps(result | {"curve": [{"epoch": 1}]}).encode(),
    }[kind]


KINDS = ["half", "empty", "zeros", "text", "list", "nothing", "state alone", "no test", "a point"]


@pytest.mark.parametrize("kind", [*KINDS, "users: half", "users: gone"])
def test_a_damaged_result_is_named_and_repeated(study, monkeypatch, capsys, kind):
    folder = study["folder"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "compare", *COMMAND])
    (run,) = folder.glob("study/runs/SASRecCCE-2021-*")
    kept = {file: file.read_bytes() for file in run.iterdir()}
    other = next(folder.glob("study/runs/SASRecCCE-2020-*"))
    parts = [folder / "study" / f".table.csv.{7**30:039}", other / f".SASRecCCE.pth.{5**40:039}"]
    for part in parts:
        part.write_text("of a command that was killed")
    repeated = []

    def execute(trials, *others):
        repeated.extend(trials)
        run.mkdir(exist_ok=True)
        for file, content in kept.items():
            file.write_bytes(content)

    monkeypatch.setattr(runs, "execute", execute)
    monkeypatch.setattr(report, "write", lambda *arguments: None)  # takes seconds, and needs what was repeated
    name = "users.npz" if kind.startswith("users") else "result.json"
    if kind == "users: gone":
        (run / name).unlink()
    else:
        content = kept[run / name]
        (run / name).write_bytes(content[: len(content) // 2] if "users" in kind else damaged(kind, content))
    try:
        cli.main()
        printed = capsys.readouterr().err
    finally:
        execute([])
    assert [trial.folder for trial in repeated] == [str(run)]
    assert re.search(rf"{re.escape(str(run / name))} is damaged \(.+\): this run is repeated\n", printed), printed
    assert not any(part.exists() for part in parts) and not (folder / "study" / ".lock").exists()


def test_one_command_at_a_time_has_a_folder(study, monkeypatch, capsys):
    """The lock is the operating system's: it goes with the process, however that ends."""
    folder = study["folder"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "compare", *COMMAND])
    monkeypatch.setattr(report, "write", lambda *arguments: None)
    (folder / "study" / ".lock").write_text("of a command that was killed")
    hold = "import os, time; from pathlib import Path; from recbole_cce.files import locked\n"
    hold += "with locked(Path('study')): print(os.getpid(), flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": python_path(SCRIPT.parent)}
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, env=environment)
    pid = other.stdout.readline().decode().strip()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    message = rf"--output: 'study' is that of another compare that is running \(process {pid} on .+\); it takes .+"
    assert re.fullmatch(rf"run_recbole_cce\.py: error: {message}", error), error
    other.kill()
    other.wait()
    other.stdout.close()
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "compare", *COMMAND])
    cli.main()


def test_no_matplotlib(study, monkeypatch, capsys):
    folder = study["folder"]
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(runs, "execute", lambda trials, *others: done.extend(trials))
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "compare", *COMMAND])
    files = {file: file.read_bytes() for file in (folder / "study").glob("table.*")}
    for file in files:
        file.unlink()
    done = []
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"run_recbole_cce\.py: error: the figures take matplotlib: pip install matplotlib; .*", error)
    assert done == []  # all runs are there
    assert {file: file.read_bytes() for file in files} == files


# One run


def make_trial(folder, model, **options):
    settings = {"checkpoint_dir": str(folder / "run"), "show_progress": "False", "state": "ERROR", "seed": 2020}
    (folder / "run").mkdir()
    return Trial(
        name=model,
        model=model,
        dataset="tiny",
        seed=2020,
        files=("tiny.yaml",),
        settings=settings | options.pop("settings", {}),
        time_limit=options.pop("time_limit", None),
        folder=str(folder / "run"),
    )


def train(monkeypatch, one, stop_at=math.inf):
    trial.train_and_test(Watch(one, stop_at, 1))
    return one.result()


@pytest.mark.parametrize(("model", "eval_step"), [("SASRec", 1), ("SASRecCCE", 1), ("SASRecCCE", 2000)])
def test_a_limit_cuts_after_the_epoch_and_tests_the_best_checkpoint(folder, monkeypatch, model, eval_step):
    settings = {"epochs": 2000, "stopping_step": 2000, "eval_step": eval_step, "repeat_bias": "none"}
    one = make_trial(folder, model, time_limit=0.5, settings=settings)
    result = train(monkeypatch, one)
    assert result["state"] == "cut"
    ends = [point["seconds"] for point in result["curve"]]
    assert ends[-1] > 0.5
    assert all(end <= 0.5 for end in ends[:-1])
    assert result["curve"][-1]["epoch"] < 1999  # validated at the cut, not at the next eval_step
    (checkpoint,) = (folder / "run").glob("*.pth")
    best = [point for point in result["curve"] if point["best"]][-1]
    assert torch.load(checkpoint)["epoch"] == best["epoch"]
    assert best["score"] == max(point["score"] for point in result["curve"])
    values = ndcg(checkpoint)
    assert np.mean(list(values.values())) == pytest.approx(result["test"]["ndcg@10"], abs=5.1e-5)


def test_a_deadline_stops_before_an_epoch_that_would_pass_it(folder, monkeypatch):
    one = make_trial(folder, "SASRecCCE", settings={"epochs": 100_000, "stopping_step": 100_000})
    result = train(monkeypatch, one, stop_at=time.time() + 1)
    assert result["state"] == "stopped" and "ndcg@10" in result["test"]
    assert not runs.is_done(one)
    one.save(result | {"state": "out of memory", "parallel": 2})
    assert not runs.is_done(one)
    one.save(result | {"state": "out of memory", "parallel": 1})
    assert runs.is_done(one)


@pytest.mark.parametrize("mode", ["full", "uni5"])
def test_several_rows_of_a_user_are_one_user(folder, monkeypatch, mode):
    """With a split by time, and with sampled negatives, where a user's held-out items are one row."""
    args = "{'split': {'RS': [0.6, 0.2, 0.2]}, 'group_by': 'none', 'order': 'TO', 'mode': '" + mode + "'}"
    one = make_trial(
        folder, "SASRecCCE", settings={"epochs": 1, "eval_args": args, "topk": "[5]", "valid_metric": "Hit@5"}
    )
    result = train(monkeypatch, one)
    config = Config("SASRecCCE", "tiny", ["tiny.yaml"], dict(one.settings))
    rows = data_preparation(config, create_dataset(config))[2]._dataset.inter_feat
    users = one.users()["user"].tolist()
    assert users == sorted(set(rows["user_id"].tolist()))
    assert result["test_users"] == len(users) < result["test_interactions"] == len(rows)
    # RecBole averages over its rows: the interactions in full ranking, the users among sampled negatives
    weights = [rows["user_id"].tolist().count(user) if mode == "full" else 1 for user in users]
    for name in ("ndcg@5", "hit@5"):
        assert np.average(one.users()[name], weights=weights) == pytest.approx(result["test"][name], abs=5.1e-5)


def test_recboles_data_sets_are_ordered_as_ours(folder, monkeypatch):
    """Seconds since 1970 within 128 s, which RecBole confuses, in a split by user and in one by time."""
    monkeypatch.chdir(folder)
    rng = np.random.default_rng(1)
    rows = [(f"u{u}", f"i{i}", 1_600_000_000 + t) for u in range(30) for i, t in enumerate(rng.permutation(500)[:8])]
    write_inter(folder / "data", "tiny", "user_id:token\titem_id:token\ttimestamp:float", rows)
    for split in ({"LS": "valid_and_test"}, {"RS": [0.6, 0.2, 0.2]}):
        args = {"split": split, "order": "TO", "mode": "full", "group_by": "none"}

        def targets(model, args=args):
            config = Config(model, "tiny", ["tiny.yaml"], {"eval_args": args})
            splits = data_preparation(config, create_dataset(config))[1:]
            assert all(part._dataset.inter_feat["timestamp"].dtype == torch.float32 for part in splits)
            return [
                sorted(
                    pair
                    for inter, _, _, items in part
                    for pair in zip(inter["user_id"].tolist(), items.tolist(), strict=True)
                )
                for part in splits
            ]

        ours, stock = targets("SASRecCCE"), targets("SASRec")
        assert ours != stock
        with pytest.MonkeyPatch.context() as patch:
            for name in ("_change_feat_format", "build"):
                patch.setattr(Dataset, name, getattr(Dataset, name))
            reading.order_exactly()
            assert targets("SASRec") == ours


# Numbers


def test_holm():
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.6, 0.7]) == [1.0, 1.0]
    assert report.holm([]) == []


def make_result(name, seed, score, **others):
    curve = [
        {
            "epoch": epoch,
            "best": epoch == 1,
            "score": score,
            "valid": {"ndcg@10": score + epoch / 100},
            "train_seconds": 2.0 * epoch + 3,
            "seconds": 3.0 * epoch + 3,
            "train_peak_gpu_gib": 1.5 * seed,
            "peak_gpu_gib": 2.5 * seed,
        }
        for epoch in range(3)
    ]
    result = {"name": name, "seed": seed, "state": "finished", "parallel": 1, "curve": curve, "parameters": 10}
    return result | {"test": {"ndcg@10": score}, "dataset": "d", "config": {"a": 1}} | others


def test_memory_of_a_gpu_is_in_table_and_figure():
    results = {name: [make_result(name, seed, 0.1 * seed) for seed in (1, 2)] for name in ("A", "B")}
    row = report.table(results, {})[0]
    assert (row.cells["GiB, training"].mean, row.cells["GiB, peak"].mean) == (2.25, 3.75)
    assert row.cells["s / epoch"].values == [2.0, 2.0]
    drawn = report.draw(results, "ndcg@10")
    assert list(drawn) == ["quality_time", "quality_memory", "curves_seconds", "curves_epochs"]


def test_figures_show_the_numbers(monkeypatch):
    """What is drawn, without the pixels."""
    drawn = []
    monkeypatch.setattr(figures, "png", lambda figure: drawn.append(figure.axes[0]) or b"")
    results = {name: [make_result(name, seed, 0.1 * seed) for seed in (1, 2)] for name in ("A", "B")}
    report.draw(results, "ndcg@10")
    time_axes, memory_axes, seconds_axes, epoch_axes = drawn
    for axes, x in ((time_axes, 5.0), (memory_axes, 2.25)):
        marks = [container.lines[0] for container in axes.containers]
        assert [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks] == [(x, pytest.approx(0.15))] * 2
    for axes, x in ((seconds_axes, [3, 5, 7]), (epoch_axes, [0, 1, 2])):
        lines, dots = axes.lines[::2], axes.lines[1::2]
        assert [list(one.get_xdata()) for one in lines] == [x] * 4
        assert [list(one.get_ydata()) for one in lines][1] == pytest.approx([0.2, 0.21, 0.22])
        assert [one.get_xdata()[0] for one in dots] == [x[1]] * 4


def test_special_characters():
    rows = [report.Row("a_b & 50% <c>|d", {"ndcg@10": report.Cell([0.5], ".4f")}, "1 failed: x_y {z}")]
    assert r"a\_b \& 50\% <c>|d & 0.5000 & 1 failed: x\_y \{z\} \\" in report.latex(rows, [])
    assert r"a_b & 50% <c>\|d" in report.markdown(report.texts(rows))
    page = report.html_page(report.texts(rows), [], {}, {"a": [make_result("a", 1, 0.5)]}, "x <y>")
    assert "a_b &amp; 50% &lt;c&gt;|d" in page and "x &lt;y&gt;" in page


# What runs there are


def plan(folder, **options):
    defaults = {"models": "", "variant": [], "vary": [], "dataset": "tiny", "config_files": "tiny.yaml"}
    defaults |= {"seeds": "1", "time_limit": None, "flags": []}
    return runs.plan(str(folder / "study"), **{**defaults, **options})


def test_vary_is_for_the_models_that_read_the_key(folder):
    options = {"models": "SASRec,SASRecCCE,SASRecSCE", "variant": ["exact=SASRecCCE,loss_type=CCE"]}
    trials = plan(folder, vary=["num_negatives:4,8"], **options)
    names = ["SASRec", "SASRecCCE num_negatives=4", "SASRecCCE num_negatives=8", "SASRecSCE", "exact"]
    assert [trial.name for trial in trials] == names
    assert [trial.settings.get("num_negatives") for trial in trials] == [None, "4", "8", None, None]
    assert len(plan(folder, vary=["learning_rate:0.1,0.2", "bucket_size_y:4,8"], **options)) == 2 * (3 + 2)
    losses = plan(folder, models="SASRecCCE", vary=["loss_type:CCE-,CCE", "num_negatives:4,8"])
    assert [trial.name.partition(" ")[2] for trial in losses] == [
        "loss_type=CCE- num_negatives=4",
        "loss_type=CCE- num_negatives=8",
        "loss_type=CCE",
    ]


def test_a_changed_setting_is_another_run(folder):
    def folders(**options):
        return {trial.folder for trial in plan(folder, **{"models": "SASRecCCE", **options})}

    one = folders()
    assert folders() == folders(flags=["--show_progress=True", "--state=ERROR"]) == one
    changed = [
        folders(flags=["--learning_rate=0.5"]),
        folders(flags=["--item_inter_num_interval=[1,inf)"]),
        folders(seeds="2"),
        folders(time_limit=3.0),
        folders(models="SASRecSCE"),
        folders(variant=["x=SASRecCCE,num_negatives=3"], models=""),
    ]
    (folder / "tiny.yaml").write_text((folder / "tiny.yaml").read_text().replace("epochs: 3", "epochs: 4"))
    changed.append(folders())
    assert len(set.union(one, *changed)) == 1 + len(changed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models="], r"--models: '' is not valid; it takes names of models"),
        (["--models=SASRec,SASRecCE"], r"--models: there is no model 'SASRecCE'; did you mean SASRec"),
        (["--models=SASRec,SASRec"], r"--models: 'SASRec' is there twice; --variant=NAME=SASRec,key=value"),
        (["--seeds=1,x"], r"--seeds: '1,x' is not valid; it takes different integers >= 0"),
        (["--seeds=1,1"], r"--seeds: '1,1' is not valid"),
        (["--seed=1"], r"--seed=1 is not an option of compare; --seeds has"),
        (["--time-limit=0"], r"--time-limit: 0.0 is not valid; it takes a number > 0"),
        (["--time-limit=soon"], r"argument --time-limit: invalid float value: 'soon'"),
        (["--parallel=0"], r"--parallel: 0 is not valid; it takes a number > 0"),
        (["--deadline=-1"], r"--deadline: -1.0 is not valid"),
        (["--vary=num_negatives"], r"--vary: 'num_negatives' is not valid; it takes key:value,value"),
        (["--vary=num_negatives:1,1"], r"--vary: 'num_negatives:1,1' is not valid; .* different values"),
        (["--vary=num_negative:1,2"], r"--vary: there is no key 'num_negative'; did you mean num_negatives"),
        (["--vary=num_negatives:1,0"], r"num_negatives: 0 is not valid; it takes an integer from 1 to 65536"),
        (["--vary=bucket_size_y:1,2"], r"--vary: bucket_size_y changes nothing in SASRec, SASRecCCE"),
        (["--vary=epochs:1,2", "--vary=epochs:3"], r"--vary: epochs is there twice"),
        (["--vary=topk:[5],[10]"], r"topk: SASRec topk=\[5\] has \[5\], SASRec topk=\[10\] has \[10\]"),
        (
            ["--variant=SASRecCCE,num_negatives=3"],
            r"--variant: 'SASRecCCE,num_negatives=3' is not valid; it takes NAME=",
        ),
        (["--variant=x=SASReck"], r"--variant: there is no model 'SASReck'; did you mean SASRec"),
        (["--variant=x=SASRecCCE,num_negative=3"], r"there is no option --num_negative; did you mean num_negatives"),
        (["--variant=x=SASRecCCE,loss_type=CCEE"], r"loss_type: 'CCEE' is not valid; it takes one of auto, CE"),
        (["--variant=x=SASRecCCE"], r"--variant: 'x' has the settings of 'SASRecCCE'"),
        (["--variant=x=BPR"], r"eval_args: SASRec has \{'split': \{'LS': 'valid_and_test'\}.*, x has"),
        (["--variant=x=SASRecCCE,exclude_seen=True"], r"exclude_seen: SASRec has None, x has True"),
        (["--metric=NDCG@7"], r"--metric: 'NDCG@7' is not valid; it takes one of ndcg@5, ndcg@10, hit@5, hit@10"),
        (["--metric=ItemCoverage@10"], r"--metric: 'ItemCoverage@10' is not valid"),
        (["--valid_metric=MRR@10"], r"valid_metric: 'MRR@10' is not among metrics and topk; it takes one of hit@10"),
        (["--eval_step=0"], r"eval_step: 0 is not valid; it takes an integer >= 1"),
        (["--topk=[31]", "--metric=NDCG@31", "--valid_metric=NDCG@31"], r"topk: \[31\] is not valid; .* at most 30"),
        (["--learnin_rate=1"], r"there is no option --learnin_rate; did you mean learning_rate"),
        (["--epochs=1", "--epochs=2"], r"--epochs is there twice, as '1' and '2'"),
        (["--dataset=tyni"], r"\[tyni\] a known dataset name"),
        (["--config_files=no.yaml"], r"--config_files: there is no file 'no.yaml'"),
        (["--output=tiny.yaml"], r"--output: 'tiny.yaml' is a file; it takes a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_for_a_mistake(folder, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(runs, "execute", lambda *arguments: pytest.fail("a run was started"))
    defaults = [
        "--models=SASRec,SASRecCCE",
        "--dataset=tiny",
        "--config_files=tiny.yaml",
        "--seeds=1",
        "--output=study",
    ]
    names = {flag.partition("=")[0] for flag in flags}
    defaults = [flag for flag in defaults if flag.partition("=")[0] not in names]
    monkeypatch.setattr(sys, "argv", ["run_recbole_cce.py", "compare", *defaults, *flags])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert re.match("run_recbole_cce.py: error: .*" + message, error), error
    assert "\n" not in error
    assert not (folder / "study").exists()


def test_an_interrupted_command_ends_its_runs(folder):
    process = start(folder, SCRIPT, *COMMAND)
    while not list(folder.glob("study/runs/*/result.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: all processes are interrupted
    assert process.wait() == 130
    assert "interrupted; the same command goes on where it stopped" in (folder / "printed.txt").read_text()
    assert "Traceback" not in (folder / "printed.txt").read_text()
    assert {result["state"] for result in results(folder).values()} == {"unfinished"}
