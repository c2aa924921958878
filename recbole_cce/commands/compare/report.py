"""What a comparison found: one table in four forms, significance over users, figures; page.py has all of it."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from recbole_cce.commands.compare import figures
from recbole_cce.commands.compare.page import html_page
from recbole_cce.commands.compare.trial import Trial
from recbole_cce.errors import UserError
from recbole_cce.files import write_bytes

Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Mean and sample deviation of the runs of one model; nothing where none of them has the value."""

    values: list[float]
    form: str

    @property
    def mean(self) -> float | None:
        """Of the runs that have the value."""
        return float(np.mean(self.values)) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Of several runs."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    def text(self, plus_minus: str = " ± ") -> str:
        """Rounded, for people."""
        parts = [part for part in (self.mean, self.deviation or None) if part is not None]
        return plus_minus.join(f"{part:{self.form}}" for part in parts) or "-"


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    cells: dict[str, Cell]
    runs: str


def write(output: Path, trials: list[Trial], metric: str, command: str) -> None:
    """Print the table and write table.csv, table.md, table.tex, the figures and report.html.

    Raises:
        UserError: matplotlib is missing; all but the figures is there then.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.name, []).append(trial)
    results = {name: [trial.result() for trial in group] for name, group in groups.items()}
    compared = significance(groups, metric)
    rows = table(results, compared)
    notes = remarks(groups, results, compared, metric)
    output.mkdir(parents=True, exist_ok=True)
    page = "\n\n".join([markdown(texts(rows)), *notes]) + "\n"
    forms = {"table.csv": as_csv(rows), "table.md": page, "table.tex": latex(rows, notes)}
    for name, text in forms.items():
        write_text(output / name, text)
    print(page)
    try:
        images, missing = draw(results, metric), None
    except ImportError as error:
        images, missing = {}, error
    for name, (_, image) in images.items():
        write_bytes(output / f"{name}.png", image)
    write_text(output / "report.html", html_page(texts(rows), notes, images, results, command))
    print(f"{output}: {', '.join([*forms, *(f'{name}.png' for name in images), 'report.html'])}")
    if missing:
        raise UserError(
            "the figures take matplotlib: pip install matplotlib; tables and page are there without them, and the same "
            "command adds them, without repeating a run"
        ) from missing


def write_text(file: Path, text: str) -> None:
    """A file, whole or not at all."""
    write_bytes(file, text.encode())


# Numbers


def best(result: Result) -> dict[str, Any] | None:
    """The validation whose weights were tested: the last that RecBole called the best so far."""
    return next((point for point in reversed(result["curve"]) if point["best"]), None)


def at_best(key: str) -> Callable[[Result], float | None]:
    """A value of the best epoch."""
    return lambda result: (best(result) or {}).get(key)


def at_end(key: str) -> Callable[[Result], float | None]:
    """A value of the last epoch."""
    return lambda result: result["curve"][-1][key] if result["curve"] else None


def in_test(metric: str) -> Callable[[Result], float | None]:
    """A value of the test."""
    return lambda result: result.get("test", {}).get(metric)


def epoch_seconds(result: Result) -> float | None:
    """Training seconds of an epoch: the median, as the first one compiles kernels and warms caches."""
    if not result["curve"]:
        return None
    seconds = np.diff([0.0, *(point["train_seconds"] for point in result["curve"])])
    epochs = np.diff([-1, *(point["epoch"] for point in result["curve"])])  # more than one with eval_step > 1
    return float(np.median(seconds / epochs))


def tested(results: Iterable[Result]) -> list[Result]:
    """Those whose best checkpoint was tested."""
    return [result for result in results if "test" in result]


Column = tuple[Callable[[Result], float | None], str]  # its value in one run, its format
COSTS: dict[str, Column] = {
    "best epoch": (at_best("epoch"), ".0f"),
    "s / epoch": (epoch_seconds, ".2f"),
    "s to best": (at_best("train_seconds"), ".1f"),
    "s to best, with validation": (at_best("seconds"), ".1f"),
    "GiB, training": (at_end("train_peak_gpu_gib"), ".2f"),
    "GiB, peak": (at_end("peak_gpu_gib"), ".2f"),
    "parameters": (lambda result: result.get("parameters"), ".0f"),
}


def metric_columns(results: dict[str, list[Result]]) -> dict[str, Column]:
    """The metrics of the test, as RecBole computes and rounds them."""
    names = dict.fromkeys(name for group in results.values() for one in tested(group) for name in one["test"])
    return {name: (in_test(name), ".4f") for name in names}


def table(results: dict[str, list[Result]], compared: dict[str, tuple[float, float]]) -> list[Row]:
    """A row for each model, with what became of its runs."""
    rows = []
    for name, group in results.items():
        metrics, costs = (
            {title: Cell([one for one in map(value, group) if one is not None], form) for title, (value, form) in part}
            for part in (metric_columns(results).items(), COSTS.items())
        )
        difference, p = ([value] for value in compared[name]) if name in compared else ([], [])
        paired = {"difference": Cell(difference, "+.4f"), "p": Cell(p, ".2g")}
        rows.append(Row(name, metrics | paired | costs, outcome(group)))
    return rows


def outcome(group: list[Result]) -> str:
    """'3 finished', '2 finished, 1 failed: ...': the states of the runs of a model."""
    counts = Counter(result["state"] for result in group)
    reasons = dict.fromkeys(result["reason"] for result in group if result["state"] == "failed")
    words = [f"{count} {state}" for state, count in counts.items()]
    return ", ".join(words) + (f": {'; '.join(reasons)}" if reasons else "")


def significance(groups: dict[str, list[Trial]], metric: str) -> dict[str, tuple[float, float]]:
    """Mean difference to the first model and its p-value, for each model that can be paired with it.

    A paired t-test over the test users: the values of a user are averaged over the seeds that both models have. The
    p-values are Holm's, corrected for their number.
    """
    first, *others = groups
    differences, p_values = {}, {}
    for name in others:
        pair = [{trial.seed: trial for trial in groups[one] if "test_split" in trial.result()} for one in (first, name)]
        seeds = sorted(set(pair[0]) & set(pair[1]))
        splits = {trials[seed].result()["test_split"] for trials in pair for seed in seeds}
        if len(splits) != 1:
            continue
        reference, values = (np.mean([trials[seed].users()[metric] for seed in seeds], axis=0) for trials in pair)
        differences[name] = float(np.mean(values - reference))
        # equal values have no t statistic
        same = np.array_equal(values, reference)
        p_values[name] = 1.0 if same else float(stats.ttest_rel(values, reference).pvalue)
    corrected = holm(list(p_values.values()))
    return {name: (differences[name], p) for name, p in zip(p_values, corrected, strict=True)}


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    steps = np.minimum(1, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    corrected = np.empty(len(p_values))
    corrected[order] = steps
    return corrected.tolist()


def remarks(
    groups: dict[str, list[Trial]],
    results: dict[str, list[Result]],
    compared: dict[str, tuple[float, float]],
    metric: str,
) -> list[str]:
    """What a reader of the table has to know, a sentence or two each."""
    every = [result for group in results.values() for result in group]
    done = tested(every)
    states = {result["state"] for result in every}
    first = next(iter(groups))
    notes = [
        "Mean and sample deviation over seeds. s / epoch is the median of an epoch's training, s to best the training "
        "up to the epoch that was best on the validation and was tested; GiB are of allocated GPU memory. Epochs count "
        "from 0, as RecBole's."
    ]
    if compared:
        users = next(result["test_users"] for result in results[first] if "test_users" in result)
        correction = f", Holm's correction for {len(compared)} comparisons" if len(compared) > 1 else ""
        notes.append(
            f"difference: of {metric} from {first}, over {users} test users, each averaged over the seeds; p: paired "
            f"t-test{correction}. It is about other users, not about other seeds."
        )
    if len({result.get("test_split") for result in done}) > 1:
        notes.append("Not all models were tested on the same interactions: only those that were are compared with p.")
    if "cut" in states:
        limit = next(result["time_limit"] for result in every if result["state"] == "cut")
        notes.append(
            f"Cut: training ended after the epoch that passed {limit:g} s; its best epoch until then was tested."
        )
    if "stopped" in states:
        notes.append("Stopped: the deadline came first; the same command trains these runs again.")
    if states & {"unfinished", "not started"}:
        notes.append("Some runs have no result yet; the same command goes on with them.")
    shared = max((result["parallel"] for result in done), default=1)
    if shared > 1:
        notes.append(f"Up to {shared} runs at a time shared the device: their seconds are not those of a run alone.")
    for text, count in Counter(f"{r['device']}; {join(r['versions'])}" for r in every if "device" in r).items():
        notes.append(f"{text} ({count} runs)." if count > 1 else f"{text}.")
    return notes


def join(pairs: dict[str, str]) -> str:
    """'torch 2.9.0, numpy 2.3.1'."""
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


# Forms of the table


def texts(rows: list[Row], plus_minus: str = " ± ") -> list[list[str]]:
    """Header and cells as text."""
    header = ["model", *rows[0].cells, "runs"]
    return [header, *([row.name, *(cell.text(plus_minus) for cell in row.cells.values()), row.runs] for row in rows)]


def markdown(table: list[list[str]]) -> str:
    """Header and rows, aligned, so that they can be read in a terminal as they are; the last column may be long."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = len(lines[0][-1])
    rule = ["-" * (width + 1) + ":" for width in widths]
    rule[0], rule[-1] = "-" * (widths[0] + 2), "-" * (widths[-1] + 2)

    def padded(line: list[str]) -> str:
        first, *middle = (cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=False))
        return f"| {' | '.join([first.strip().ljust(widths[0]), *middle, line[-1].ljust(widths[-1])])} |"

    return "\n".join([padded(lines[0]), f"|{'|'.join(rule)}|", *map(padded, lines[1:])])


def as_csv(rows: list[Row]) -> str:
    """Numbers in full, the deviation in a column of its own."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["model", *(part for title in rows[0].cells for part in (title, f"{title}, deviation")), "runs"])
    for row in rows:
        writer.writerow(
            [row.name, *(part for cell in row.cells.values() for part in (cell.mean, cell.deviation)), row.runs]
        )
    return stream.getvalue()


def latex(rows: list[Row], notes: list[str]) -> str:
    """A tabular for the package booktabs; the notes are comments."""
    header, *lines = texts(rows, r" $\pm$ ")
    body = [
        " & ".join(cell if r"$\pm$" in cell else escaped(cell) for cell in line) + r" \\" for line in [header, *lines]
    ]
    begin = rf"\begin{{tabular}}{{l{'r' * len(rows[0].cells)}l}}"
    comments = [f"% {note}" for note in notes]
    return "\n".join(
        [*comments, begin, r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}", ""]
    )


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda match: special.get(match[0], "\\" + match[0]), text)


# Figures


def draw(results: dict[str, list[Result]], metric: str) -> dict[str, tuple[str, bytes]]:
    """File name -> caption and PNG; one that has nothing to show (memory without a GPU) is left out."""
    order, drawn = list(results), {}
    scatters = {
        "quality_time": ("training seconds to the best epoch", at_best("train_seconds")),
        "quality_memory": ("peak GPU memory of training, GiB", at_end("train_peak_gpu_gib")),
    }
    for file, (label, value) in scatters.items():
        points = {}
        for name, group in results.items():
            pairs = [(one, result["test"][metric]) for result in tested(group) if (one := value(result)) is not None]
            x, y = (Cell([pair[axis] for pair in pairs], "") for axis in (0, 1))
            if x.mean is not None and y.mean is not None:
                points[name] = figures.Point(x.mean, y.mean, x.deviation or 0, y.deviation or 0)
        if points:
            caption = f"Test {metric} against {label}. Bars: sample deviation over seeds."
            drawn[file] = caption, figures.scatter(points, order, label, f"test {metric}")
    for file, (label, key) in {
        "curves_seconds": ("training seconds", "train_seconds"),
        "curves_epochs": ("epoch", "epoch"),
    }.items():
        runs = {
            name: [
                figures.Curve(
                    [point[key] for point in result["curve"]],
                    [point["valid"][metric] for point in result["curve"]],
                    result["curve"].index(best(result)),
                )
                for result in group
                if best(result)
            ]
            for name, group in results.items()
        }
        if any(runs.values()):
            caption = f"Validation {metric} over {label}, a line for each run. Dots: the epochs that were tested."
            drawn[file] = caption, figures.curves(runs, order, label, f"validation {metric}")
    return drawn
