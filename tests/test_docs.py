"""README and docs: examples run as they stand on the page, tables say what the code says, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recbole.config import Config
from torch.nn import functional as F

from recbole_cce import cli
from recbole_cce.nn.losses import registry, sampled
from recbole_cce.ops import negatives
from recbole_cce.plugin import checks, keys, registration
from tests.conftest import write_inter
from tests.process import SCRIPT, python_path

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
    namespace = {**vars(sampled), "LOSSES": {}}
    exec(block_after(ADDING, "At the end of `recbole_cce/nn/losses/sampled.py`"), namespace)
    config = {"loss_backend": "auto", "loss_dtype": "auto", "num_negatives": 9, "negative_sharing": "tile"}
    config |= {"logq_correction": True, "negative_distribution": "uniform", "negative_alpha": 1.0}
    loss = namespace["LOSSES"]["BPR"](config, torch.ones(6))
    hidden, weight = torch.randn(5, 8), torch.randn(7, 8)
    target = torch.tensor([3, 1, 0, 6, 2])
    torch.manual_seed(0)
    value = loss(hidden, target, weight).item()
    torch.manual_seed(0)
    seed = negatives.new_seed(torch.device("cpu"))
    drawn = negatives.draw_negatives(negatives.Uniform(), seed, torch.zeros(1, dtype=torch.int64), 9, 7, 0)[0].tolist()
    assert 0 not in drawn
    scores = (hidden.double() @ weight.double().T).tolist()
    expected = []
    for row, y in zip(scores, target.tolist(), strict=True):
        terms = [-F.logsigmoid(torch.tensor(row[y] - row[k])).item() for k in drawn if k != y]
        expected += [sum(terms) / 9] if y else []
    assert value == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_loss_of_the_page_trains_in_the_place_it_names(tmp_path, tiny):
    copy = tmp_path / "copy"
    for name in ("recbole_cce", "properties"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "run_recbole_cce.py", copy)
    with open(copy / "recbole_cce" / "nn" / "losses" / "sampled.py", "a") as file:
        file.write("\n\n" + block_after(ADDING, "At the end of `recbole_cce/nn/losses/sampled.py`"))
    (command,) = [line for line in commands(ADDING) if "--loss_type=BPR" in line]
    columns = "--load_col={'inter': ['user_id', 'item_id', 'timestamp']}"
    output = run(command, copy, *SHORT, "--epochs=2", "--dataset=tiny", f"--data_path={tiny}", columns)
    assert "recbole_cce/nn/losses/sampled.py" not in output  # no warning or traceback from there
    assert 0 < metric(output, "ndcg@5") <= 1
    with pytest.raises(ValueError, match="loss_type: 'BPR' is not valid"):  # without step 1
        Config("SASRecCCE", "ml-100k", config_dict={"loss_type": "BPR"})


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
    defaults = set(registration.read_yaml(registration.MODELS["SASRecCCE"]))
    assert not {"load_col", "eval_args", "topk", "metrics", "MAX_ITEM_LIST_LENGTH"} & names
    assert {key for key in names if key in keys.KEYS} <= defaults


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
    """Lists the keys of keys.py and no other, in their order, with the defaults of SASRecCCE and the same words."""
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*?) \|$", README, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(keys.KEYS)
    defaults = registration.read_yaml(registration.MODELS["SASRecCCE"])
    for name, default, meaning in rows:
        assert str(defaults.get(name, "~")) == default, name
        assert meaning == f"{keys.KEYS[name].help}; {keys.KEYS[name].valid}", name


def test_flags_on_the_pages_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for line in commands(text) if "run_recbole_cce.py" in line]
        for line in lines:
            words = shlex.split(line)
            command = words[words.index("run_recbole_cce.py") + 1 :][:1]
            if command and command[0] in cli.COMMANDS:
                cli.COMMANDS[command[0]][0]().parse_args([word for word in words if word.startswith("--")])
                continue
            flags = [word for word in words if word.startswith("--") and "=" in word]
            options = {"--model", "--dataset", "--config_files", "--nproc", "--resume"}
            flags = [flag for flag in flags if flag.partition("=")[0] not in options and flag != "--loss_type=BPR"]
            checks.check_flags(flags, {}, "SASRecCCE")
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
    elsewhere = {
        "cache_data",
        "architecture",
        "attention",
        "cuda_graph",
        "compile_encoder",
        "checkpoint_interval",
        "adam_betas",
        "positions",
        "repeat_bias",
        "exclude_seen",
        "eval_chunk_items",
    }
    for key in set(keys.KEYS) - elsewhere:
        assert re.search(rf"\b{key}\b", page), key
