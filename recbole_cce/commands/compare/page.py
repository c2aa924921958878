"""One HTML page with all that a comparison found; it loads nothing."""

from __future__ import annotations

import base64
import html
import json
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top }
.numbers :is(th, td):not(:first-child, :last-child) { text-align: right }
.numbers td:not(:last-child) { white-space: nowrap }
.numbers td:last-child { min-width: 12rem }
figure { margin: 1rem 0 } img { max-width: min(100%, 60rem) } figcaption { color: #555 }
code, pre { background: #f5f5f5; padding: .1rem .3rem; white-space: pre-wrap; overflow-wrap: anywhere }
"""


def html_page(
    table: list[list[str]],
    notes: list[str],
    images: dict[str, tuple[str, bytes]],
    results: dict[str, list[dict[str, Any]]],
    command: str,
) -> str:
    """One file with table (header and rows), figures, failures and settings."""
    every = [result for group in results.values() for result in group]
    dataset = every[0]["dataset"]
    parts = [f"<h1>Models on {html.escape(dataset)}</h1>", f"<pre>{html.escape(command)}</pre>", "<h2>Results</h2>"]
    parts += [html_table(table, "numbers"), *(f"<p>{html.escape(note)}</p>" for note in notes)]
    parts += [html_figure(caption, image) for caption, image in images.values()]
    troubles = [result for result in every if result["state"] not in ("finished", "cut")]
    if troubles:
        lines = [[one["name"], str(one["seed"]), one["state"], one.get("reason", "")] for one in troubles]
        parts += [
            "<h2>Runs without a result</h2>",
            html_table([["model", "seed", "state", "reason"], *lines]),
        ]
    parts += ["<h2>Settings</h2>", *html_settings(results)]
    return document(f"Models on {dataset}", parts)


def document(title: str, parts: list[str]) -> str:
    """A whole page of parts that are HTML."""
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def html_figure(caption: str, image: bytes) -> str:
    """A PNG within the page."""
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    caption = html.escape(caption)
    return f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def html_settings(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Configuration keys in which the models differ, then those that all share."""
    configs: dict[str, dict[str, Any]] = {
        name: found[0]
        for name, group in results.items()
        if (found := [result["config"] for result in group if "config" in result])
    }
    keys = sorted(set().union(*configs.values()) - {"checkpoint_dir", "seed", "model"})
    values = {key: [json.dumps(config[key]) if key in config else "-" for config in configs.values()] for key in keys}
    differing = [[key, *row] for key, row in values.items() if len(set(row)) > 1]
    shared = [[key, row[0]] for key, row in values.items() if len(set(row)) == 1]
    return [
        "<p>What differs between the models; a dash where a model does not have the key.</p>",
        html_table([["key", *configs], *differing]),
        f"<details><summary>What all share</summary>{html_table([['key', 'value'], *shared])}</details>",
    ]


def html_table(lines: list[list[str]], kind: str = "words") -> str:
    """Header and rows."""

    def row(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return "\n".join(
        [f'<table class="{kind}">', row(lines[0], "th"), *(row(line, "td") for line in lines[1:]), "</table>"]
    )
