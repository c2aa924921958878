"""How RecBole's Config reads what a user gives, in flags, YAML files and config_dict: as literals, never as code.

RecBole passes strings to eval().
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import yaml

from recbole_cce.errors import UserError
from recbole_cce.plugin.config_keys import RECBOLE_KEYS


def literal(text: str) -> Any:
    """The number, string, list, tuple, dict, bool or None that `text` writes in Python, or in any case of true and
    false; `text` itself where it writes none of these."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    return value if value is None or isinstance(value, (str, int, float, list, tuple, dict)) else text


def literals(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Config._convert_config_dict: literal() of each string, but a number stays text where a key takes text."""

    def value(key: str, given: Any) -> Any:
        read = literal(given) if isinstance(given, str) else given
        _, accepts = RECBOLE_KEYS.get(key, ("", lambda value: True))
        is_name = isinstance(read, (int, float)) and accepts(given) and not accepts(read)  # a folder called 2024
        return given if is_name else read

    return {key: value(key, given) for key, given in settings.items()}


class Loader(yaml.SafeLoader):
    """YAML of plain values, with 1e-3 for a number and Python's tuples, as RecBole's loader has them."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def python_tuple(loader: Loader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    """A list of YAML that is tagged as a tuple."""
    return tuple(loader.construct_sequence(node, deep=True))


Loader.add_constructor("tag:yaml.org,2002:python/tuple", python_tuple)


def read_yaml(file: Path | str, option: str = "config_file_list") -> dict[str, Any]:
    """The settings of a YAML file; none where it holds comments only.

    Raises:
        UserError: names the option and the file, which is not there, or does not hold `key: value` lines.
    """
    try:
        settings = yaml.load(Path(file).read_text(encoding="utf-8-sig"), Loader)
    except OSError as error:
        raise UserError(f"{option}: there is no file {str(file)!r}, or it cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: another encoding, a 13th month
        raise UserError(f"{option}: {str(file)!r} is not YAML: {error}") from None
    settings = {} if settings is None else settings
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"{option}: {str(file)!r} holds no 'key: value' lines")
    return settings


def read_files(files: Iterable[str], option: str) -> dict[str, Any]:
    """The settings of YAML files, of which later ones win; errors as of read_yaml()."""
    return {key: value for file in files for key, value in read_yaml(file, option).items()}


def file_names(text: str | None) -> list[str]:
    """Names of files, separated by spaces; where a file has spaces in its name, the longest name that there is."""
    words, names = (text or "").split(" "), []
    while words:
        ends = [end for end in range(len(words), 1, -1) if Path(" ".join(words[:end])).is_file()]
        names.append(" ".join(words[: ends[0] if ends else 1]))
        del words[: ends[0] if ends else 1]
    return [name for name in names if name]


def load_config_files(self: Any, files: list[str] | None) -> dict[str, Any]:
    """Config._load_config_files."""
    return read_files(files or [], "config_file_list")


def load_cmd_line(self: Any) -> dict[str, Any]:
    """Config._load_cmd_line: every --key=value of sys.argv; a value may have `=` in it.

    Raises:
        UserError: a flag is there twice, with different values.
    """
    if "ipykernel_launcher" in sys.argv[0]:
        return {}
    given: dict[str, str] = {}
    others = []
    for word in sys.argv[1:]:
        key, equals, value = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and equals):
            others.append(word)
        elif given.setdefault(key, value) != value:
            raise UserError(f"duplicate flag --{key}, as {given[key]!r} and {value!r}; give it once")
    if others:
        getLogger().warning(f"command line args [{' '.join(others)}] will not be used in RecBole")
    return literals(given)


def install() -> None:
    """Put the functions above into Config, and literal() where else RecBole's files call eval()."""
    from recbole.config import Config
    from recbole.model.context_aware_recommender import kd_dagfm
    from recbole.trainer import hyper_tuning

    Config._convert_config_dict = lambda self, settings: literals(settings)
    Config._load_config_files = load_config_files
    Config._load_cmd_line = load_cmd_line
    # a module's own global shadows the builtin it asks for
    hyper_tuning.eval = ast.literal_eval  # the values of a `choice` in a file of parameters
    kd_dagfm.eval = teacher


def teacher(name: str) -> type:
    """The teacher network of RecBole's KD_DAGFM that the key of this name asks for."""
    from recbole.model.context_aware_recommender import kd_dagfm

    networks = {"CrossNet": kd_dagfm.CrossNet, "CIN": kd_dagfm.CIN}
    if name not in networks:
        raise UserError(f"teacher: {name!r} is not valid; it takes one of {', '.join(networks)}")
    return networks[name]
