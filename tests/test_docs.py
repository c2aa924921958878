"""README and docs: examples run as they stand on the page, tables say what the code says, links lead somewhere."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from recbole_cce import cli
from recbole_cce.nn.losses import registry
from recbole_cce.ops import negatives
from recbole_cce.plugin import config_checks, config_keys, registration
from tests.conftest import write_inter
from tests.process import SCRIPT, python, python_path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDING = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def block_after(page: str, line: str) -> str:
    """The code block that follows a line that starts with `line`."""
    return re.search(rf"^{re.escape(line)}.*?^```\w+\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [line.partition("  #")[0].strip() for line in lines]


def run(command: str, folder: Path, *flags: str) -> str:
    """Run a command of a page with the tests' Python, with flags that make it short; returns what it printed."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    result = subprocess.run([*words, *flags], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout + result.stderr


def metric(output: str, name: str) -> float:
    return float(re.findall(rf"'{name}'[,:] ([\d.]+)", output)[-1])


SHORT = ("--use_gpu=False", "--show_progress=False", "--topk=[5]", "--valid_metric=NDCG@5")
FEW_USERS = "--user_inter_num_interval=[20,30]"  # of ml-100k


# Adding a loss


def test_loss_of_the_page_is_the_formula_it_names():
    namespace = {}
    with mock.patch.dict(registry.LOSSES):
        exec(block_after(ADDING, "`my_losses.py`:"), namespace)
        assert registry.LOSSES["BPR"] is namespace["BPR"]
    config = {name: key.default for name, key in namespace["BPR"].keys.items()}
    loss = namespace["BPR"](config | {"num_negatives": 9, "bpr_margin": 0.5}, torch.ones(6))
    hidden, weight = torch.randn(5, 8), torch.randn(7, 8)
    target = torch.tensor([3, 1, 0, 6, 2])
    torch.manual_seed(0)
    value = loss(hidden, target, weight).mean.item()
    torch.manual_seed(0)
    seed = negatives.new_seed(torch.device("cpu"))
    drawn = negatives.draw_negatives(negatives.Uniform(), seed, torch.zeros(1, dtype=torch.int64), 9, 7, 0)[0].tolist()
    assert 0 not in drawn
    scores = (hidden.double() @ weight.double().T).tolist()
    expected = []
    for row, y in zip(scores, target.tolist(), strict=True):
        terms = [-F.logsigmoid(torch.tensor(row[y] - row[k] - 0.5)).item() for k in drawn if k != y]
        expected += [sum(terms) / 9] if y else []
    assert value == pytest.approx(sum(expected) / 4, rel=1e-5)


def cli_command(page: str, part: str) -> str:
    """The one command of a page that has `part`, with the script where it is."""
    (command,) = [line for line in commands(page) if part in line]
    return command.replace("run_recbole_cce.py", str(SCRIPT))


@pytest.fixture
def own_loss(tmp_path):
    """A folder with the page's file."""
    (tmp_path / "my_losses.py").write_text(block_after(ADDING, "`my_losses.py`:"))
    return tmp_path


def test_loss_of_the_page_trains_and_its_checkpoint_is_read(own_loss, tiny):
    """From a folder that is not the package's."""
    columns = "--load_col={'inter': ['user_id', 'item_id', 'timestamp']}"
    data = ("--dataset=tiny", f"--data_path={tiny}", columns)
    output = run(cli_command(ADDING, "--loss_type=BPR"), own_loss, *SHORT, "--epochs=2", *data)
    assert 0 < metric(output, "ndcg@5") <= 1
    (file,) = (own_loss / "saved").glob("*.pth")
    config = torch.load(file, weights_only=True)["config"]
    assert (config["loss_type"], config["bpr_margin"], config["num_negatives"]) == ("BPR", 0.5, 256)
    assert "plugin" not in config
    recommend = [str(SCRIPT), "recommend", f"--checkpoint={file}", "--output=top.csv", "--k=3"]
    run(shlex.join(["python", *recommend, "--plugin=my_losses.py"]), own_loss)
    assert (own_loss / "top.csv").read_text().startswith("user,item,rank,score\n")
    process = python(*recommend, cwd=own_loss)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].endswith(
        "the checkpoint's loss_type: there is no loss 'BPR'; import the module that registers it first; on the command "
        "line, --plugin=FILE.py does"
    )
    process = python(SCRIPT, "--loss_type=BPR", cwd=own_loss)
    assert "loss_type: 'BPR' is not valid; it takes one of auto, CE, " in process.stderr.splitlines()[-1]


def test_plan_and_help_know_the_loss_of_the_page(own_loss):
    assert re.search(r"^\| BPR +\|", run(cli_command(ADDING, "plan --plugin"), own_loss), re.MULTILINE)
    text = run(f"python {SCRIPT} --plugin=my_losses.py --help", own_loss)
    assert "--bpr_margin=0.0\n      BPR: how far a target is to be above a negative; a number from 0 to 10" in text
    assert "one of auto, CE, CCE, CCE-, CE-, SCE, BCE, gBCE, BPR" in text


def test_compare_varies_a_key_of_the_loss_of_the_page(own_loss, tiny):
    columns = "--load_col={'inter': ['user_id', 'item_id', 'timestamp']}"
    words = ["compare", "--plugin=my_losses.py", "--models=SASRecCCE", "--dataset=tiny", f"--data_path={tiny}", columns]
    words += ["--vary=loss_type:CCE,BPR", "--vary=bpr_margin:0,1", "--seeds=1", "--epochs=1", "--output=study"]
    run(shlex.join(["python", str(SCRIPT), *words]), own_loss, *SHORT, "--metric=NDCG@5")
    results = [json.loads(file.read_text()) for file in (own_loss / "study" / "runs").glob("*/result.json")]
    names = ["SASRecCCE loss_type=BPR bpr_margin=0", "SASRecCCE loss_type=BPR bpr_margin=1", "SASRecCCE loss_type=CCE"]
    assert sorted(result["name"] for result in results) == names
    assert all(result["state"] == "finished" for result in results)


# Adding a model


def test_model_of_the_page_runs(tmp_path):
    for name in ("gru4rec_cce.py", "GRU4RecCCE.yaml", "run.py"):
        (tmp_path / name).write_text(block_after(ADDING, f"`{name}`:"))
    (command,) = [line for line in commands(ADDING) if line.startswith("python run.py")]
    command = command.replace("--epochs=20", "--epochs=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(SCRIPT.parent))
        output = run(command, tmp_path, FEW_USERS, *SHORT)
    assert metric(output, "ndcg@5") > 0
    assert "GRU4RecCCE" in output
    names = set(registration.read_yaml(tmp_path / "GRU4RecCCE.yaml"))
    assert not {"load_col", "eval_args", "topk", "metrics", "MAX_ITEM_LIST_LENGTH"} & names
    (command,) = [line for line in commands(ADDING) if "--model=GRU4RecCCE" in line]
    command = command.replace("--epochs=20", "--epochs=1").replace("run_recbole_cce.py", str(SCRIPT))
    assert metric(run(command, tmp_path, FEW_USERS, *SHORT), "ndcg@5") == metric(output, "ndcg@5")


# README


def test_python_example_of_the_readme_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example", "--epochs=1", "--state=ERROR", FEW_USERS, *SHORT])
    (example,) = blocks(README, "python")
    exec(example, {})
    assert metric(capsys.readouterr().out, "ndcg@5") > 0


def test_yaml_example_of_the_readme_reads_own_data(tmp_path, monkeypatch):
    (example,) = blocks(README, "yaml")
    (tmp_path / "my.yaml").write_text(example)
    rows = [(f"u{user}", f"i{(user + step) % 9}", step) for user in range(12) for step in range(6)]
    write_inter(tmp_path / "data", "mine", "user_id:token\titem_id:token\ttimestamp:float", rows)
    (command,) = [line for line in commands(README) if "--dataset=mine" in line]
    words = [
        *shlex.split(command)[1:],
        "--config_files=my.yaml",
        "--epochs=1",
        "--state=ERROR",
        "--num_negatives=4",
        *SHORT,
    ]
    monkeypatch.setattr(sys, "argv", words)
    cli.main()


def test_table_of_keys_in_the_readme():
    """Lists the keys of the package and no other, in their order, with the defaults of SASRecCCE and the same words."""
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*?) \|$", README, re.MULTILINE)
    keys, defaults = config_keys.keys_of_package(), registration.defaults("SASRecCCE")
    assert [name for name, _, _ in rows] == list(keys)
    for name, default, meaning in rows:
        assert str(defaults.get(name, "~")) == default, name
        assert meaning == f"{keys[name].help}; {keys[name].valid}", name


def test_flags_on_the_pages_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for line in commands(text) if "run_recbole_cce.py" in line]
        for line in lines:
            words = shlex.split(line)
            command = words[words.index("run_recbole_cce.py") + 1 :][:1]
            if "--plugin=" in line:  # run above
                continue
            if command and command[0] in cli.COMMANDS:
                cli.COMMANDS[command[0]][0]().values([word for word in words if word.startswith("--")])
                continue
            flags = [word for word in words if word.startswith("--") and "=" in word]
            options = {"--model", "--dataset", "--config_files", "--nproc", "--resume"}
            flags = [flag for flag in flags if flag.partition("=")[0] not in options]
            config_checks.check_flags(flags, {}, "SASRecCCE")
            for file in re.findall(r"--config_files=(properties/\S+)", line):
                assert (ROOT / file).is_file(), file


def test_continuous_integration_runs_the_commands_of_the_readme():
    """Those of the first block, shortened, and of the tests; the virtual environment it makes elsewhere."""
    script = (ROOT / ".ci" / "run").read_text().replace(" --epochs=1", "").splitlines()
    start = [line for block in blocks(README, "bash")[:2] for line in block.splitlines()]
    assert start[0].startswith("python3 -m venv")
    assert "pip install --no-deps recbole==1.2.1" in start
    positions = [script.index(line) for line in start[1:]]
    assert positions == sorted(positions)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page has after its #."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)", prose(page)):
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)}: {link}"


def test_index_has_one_line_for_each_page():
    index = ROOT / "docs" / "README.md"
    listed = re.findall(r"^- \[(.+?)\]\((.+?)\): ", index.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(name == link for name, link in listed)
    assert sorted(index.parent / link for _, link in listed) == [page for page in PAGES[1:] if page != index]


def test_figures_are_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in re.findall(r"!\[.*?\]\((.+?)\)", prose(page))}
    assert set((ROOT / "docs").rglob("*.png")) <= shown


# The page of losses


def test_page_of_losses_has_every_loss_and_its_keys():
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([A-Za-z-]+)` \|", page, re.MULTILINE) == list(registry.LOSSES)
    for key in ("loss_type", "train_targets", "amp_dtype", *registry.declared()):
        assert re.search(rf"\b{key}\b", page), key


# The page of the architecture


def defined(file: Path) -> set[str]:
    """Classes, functions and methods of a file, methods with their class before them."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_steps_of_the_architecture_are_in_their_files():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walks = [re.findall(r"^\d+\. `(\S+)`, `(\S+)`", part, re.MULTILINE) for part in text.split("\n## ")]
    walks = [steps for steps in walks if steps]
    assert len(walks) == 2 and all(1 < len(steps) <= 15 for steps in walks)
    for file, name in [step for steps in walks for step in steps]:
        assert name in defined(ROOT / file), f"{file}: {name}"
    for file in re.findall(r"`(recbole_cce/\S+?\.py)`", text):
        assert (ROOT / file).is_file(), file
