"""What a search found: best.yaml, one table in three forms, figures, and a page that loads nothing."""

from __future__ import annotations

import csv
import html
import io
import shlex
from pathlib import Path
from typing import Any

import yaml

from recbole_cce.commands.compare import figures
from recbole_cce.commands.compare.page import document, html_figure, html_table
from recbole_cce.commands.compare.report import best, join, markdown, write_text
from recbole_cce.commands.tune import durations
from recbole_cce.commands.tune.search import Result, Search, described, value
from recbole_cce.files import write_bytes
from recbole_cce.plugin import extensions

SHOWN = 10  # rows that are printed


def write(search: Search, number: int, given: dict[str, Any], metric: str, test: Result, command: str) -> None:
    """Print the best rows; write best.yaml, table.csv, table.md, the figures and report.html.

    Args:
        search: which has ended.
        number: of its best trial.
        given: what the user set, and every trial had.
        metric: name of the value.
        test: of that trial.
        command: what was typed.
    """
    output = search.output
    title = f"{search.base.model} tuned on {search.base.dataset}"
    settings = best_settings(search, number, given)
    text = best_yaml(search, number, settings, metric, command)
    write_text(output / "best.yaml", text)
    lines, notes = table(search, metric), remarks(search, number, metric, test)
    page = "\n\n".join([markdown(lines), *notes]) + "\n"
    write_text(output / "table.csv", as_csv(lines))
    write_text(output / "table.md", page)
    images = draw(search, metric)
    for name, (_, image) in images.items():
        write_bytes(output / f"{name}.png", image)
    parts = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(command)}</pre>"]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    parts += [html_figure(caption, image) for caption, image in images.values()]
    parts += [f"<h2>best.yaml</h2><pre>{html.escape(text)}</pre>", "<h2>Trials</h2>", html_table(lines, "numbers")]
    write_text(output / "report.html", document(title, parts))
    print("\n\n".join([markdown(lines[: SHOWN + 1]), *notes]))
    files = ["best.yaml", "table.csv", "table.md", *(f"{name}.png" for name in images), "report.html"]
    print(f"\n{output}: {', '.join(files)}")
    print(f"trial {number} again: {train_command(output / 'best.yaml')}")


def train_command(file: Path) -> str:
    """That trains what best.yaml says, which names model and data set, too."""
    plugins = "".join(f" --plugin={shlex.quote(plugin)}" for plugin in extensions.FILES.values())
    return f"python run_recbole_cce.py{plugins} --config_files={shlex.quote(str(file))}"


# best.yaml


def best_settings(search: Search, number: int, given: dict[str, Any]) -> dict[str, Any]:
    """Every key that the best trial had and a default run has not."""
    base = {"model": search.base.model, "dataset": search.base.dataset}
    settings = base | given | base | {"seed": search.base.seed}  # flags win over what a file names
    if number != 0:
        settings |= search.study.values()[number]
    result = search.results[number]
    if result["state"] != "finished":
        settings["epochs"] = result["curve"][-1]["epoch"] + 1
    return settings


def best_yaml(search: Search, number: int, settings: dict[str, Any], metric: str, command: str) -> str:
    """The file, with a comment on where it comes from."""
    result = search.results[number]
    comments = [
        f"trial {number} of {len(search.results)}, validation {metric} {value(result):.4f}, seed "
        f"{search.base.seed}, found by",
        f"  {command}",
        train_command(search.output / "best.yaml") + " trains it again",
    ]
    if result["state"] != "finished":
        comments.append(f"epochs: where the search {result['state']} it; without this line it may become better")
    text = yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}\n" for line in comments) + text


def plain(given: Any) -> Any:
    """With lists for tuples, which YAML does not have."""
    if isinstance(given, dict):
        return {key: plain(one) for key, one in given.items()}
    return [plain(one) for one in given] if isinstance(given, (list, tuple)) else given


# The table


def ranked(search: Search) -> list[int]:
    """Trials from the best on, those without a value last."""
    sign = -1 if search.study.bigger else 1

    def place(number: int) -> tuple:
        found = value(search.results[number])
        return found is None, sign * (found or 0.0), number

    return sorted(search.results, key=place)


def table(search: Search, metric: str) -> list[list[str]]:
    """Header, and a row for each trial that has ended."""
    keys, values = [one.key for one in search.study.space], search.study.values()
    lines = [["trial", f"validation {metric}", "best epoch", "epochs", "seconds", *keys, "state"]]
    for number in ranked(search):
        result = search.results[number]
        found, point, curve = value(result), best(result), result["curve"]
        lines.append(
            [
                f"{number} (defaults)" if number == 0 else str(number),
                "-" if found is None else f"{found:.4f}",
                "-" if point is None else str(point["epoch"]),
                str(curve[-1]["epoch"] + 1) if curve else "0",
                f"{result['ended'] - result['begun']:.1f}",
                *(str(values[number].get(key, "-")) for key in keys),
                f"{result['state']}: {result['reason']}" if "reason" in result else result["state"],
            ]
        )
    return lines


def as_csv(lines: list[list[str]]) -> str:
    """The table with nothing where a dash is."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(
        [["" if cell == "-" else cell for cell in line] for line in lines]
    )
    return stream.getvalue()


def remarks(search: Search, number: int, metric: str, test: Result) -> list[str]:
    """What a reader of the table has to know, a sentence or two each."""
    results, point = search.results, best(search.results[number])
    assert point is not None
    default = value(results[0]) if 0 in results else None
    found = f"Trial {number} is the best, with a validation {metric} of {value(results[number]):.4f} in epoch "
    found += f"{point['epoch']} ({described(search.study.values()[number])})"
    notes = [
        f"{found}; the defaults, trial 0, have {'no value' if default is None else f'{default:.4f}'}.",
        "Test of the best trial, computed once, after it was chosen: "
        + (join({key: str(one) for key, one in test["test"].items()}) if "test" in test else test["reason"])
        + ".",
        f"{len(results)} trials in {durations.words(search.study.seconds)}, all with seed {search.base.seed}. A value "
        "is the best validation of all epochs of a trial: the best of many is a little lucky, and the test tells.",
    ]
    states = {result["state"] for result in results.values()}
    if "pruned" in states:
        notes.append("Pruned: after so many epochs it was in the worse half of the trials that came that far.")
    if states & {"stopped", "late"}:
        notes.append("Stopped or late: the budget ended first; with a larger one these trials are run again.")
    if search.parallel > 1:
        notes.append(
            f"Up to {search.parallel} trials at a time shared the machine: their seconds are not those of one."
        )
    for text in dict.fromkeys(f"{r['device']}; {join(r['versions'])}." for r in results.values() if "device" in r):
        notes.append(text)
    return notes


# Figures


def draw(search: Search, metric: str) -> dict[str, tuple[str, bytes]]:
    """File name -> caption and PNG."""
    best_values = {number: one for number, result in search.results.items() if (one := value(result)) is not None}
    label = f"validation {metric}"
    drawn = {
        "progress": (
            f"Best {label} so far over the seconds of the search, and that of the defaults.",
            figures.curves(progress(search), ["best of all", "defaults"], "seconds", label),
        ),
        "curves": (
            f"{label.capitalize()} over epochs, a line for each trial. Dots: its best epoch.",
            figures.curves(curves(search), ["pruned", "others", "defaults", "best"], "epoch", label),
        ),
    }
    if importances := search.study.importances(best_values):
        caption = "How much each key says about which trials are among the better ones (PED-ANOVA, by Optuna)."
        drawn["keys"] = caption, figures.bars(importances, "share")
    return drawn


def progress(search: Search) -> dict[str, list[figures.Curve]]:
    """The best value so far after each validation of any trial, and of the first one."""
    better = max if search.study.bigger else min
    runs = {}
    for name, numbers in {"best of all": list(search.results), "defaults": [0]}.items():
        points = sorted(
            (result["fit_at"] + point["seconds"], point["score"])
            for number, result in search.results.items()
            if number in numbers and value(result) is not None
            for point in result["curve"]
        )
        if points:
            x, y = [points[0][0]], [points[0][1]]
            for seconds, score in points[1:]:  # in steps
                x += [seconds, seconds]
                y += [y[-1], better(y[-1], score)]
            runs[name] = [figures.Curve(x, y, y.index(better(y)))]
    return runs


def curves(search: Search) -> dict[str, list[figures.Curve]]:
    """Validation after each epoch, in groups of trials."""
    groups: dict[str, list[figures.Curve]] = {"pruned": [], "others": [], "defaults": [], "best": []}
    for number, result in search.results.items():
        if value(result) is None:
            continue
        other = "pruned" if result["state"] == "pruned" else "others"
        name = "best" if number == search.best else "defaults" if number == 0 else other
        points = result["curve"]
        x, y = [point["epoch"] for point in points], [point["score"] for point in points]
        groups[name].append(figures.Curve(x, y, points.index(best(result))))
    return groups
