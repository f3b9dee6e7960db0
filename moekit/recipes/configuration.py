"""Settings from a command line and the file that ``--config`` names."""

import json
import re
import reprlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from moekit.recipes.derived import DERIVED, derived_names, give_way, is_of_a_run, typed_flags
from moekit.recipes.settings import TrainSettings
from moekit.recipes.stored_settings import flat_settings
from moekit.recipes.wording import flag_of

_OF_A_LAUNCH = frozenset({"config", "help", "h", "tyro_print_completion", "tyro_write_completion"})  # are no settings
_LONGEST = 200  # characters of a value in a message


class Parsed(NamedTuple):
    """Settings, and which of them nobody gave.

    Attributes:
        settings: that were read.
        derived: names of those that an earlier run filled in, as its file says, and that no flag touches.
    """

    settings: TrainSettings
    derived: tuple[str, ...]


def parse_settings(arguments: list[str], *, prog: str | None = None) -> TrainSettings:
    """Read the settings as ``parse`` does, and return them alone.

    Args:
        arguments: the words.
        prog: name of the program in the help text.

    Returns:
        TrainSettings.

    Raises:
        SystemExit, FileNotFoundError, ValueError: as ``parse``.

    Example:
        >>> parse_settings(["--moe-num-experts", "4", "--steps", "60"]).optimizer.steps
        60
    """
    return parse(arguments, prog=prog).settings


def parse(arguments: list[str], *, prog: str | None = None) -> Parsed:
    """Read the settings from a command line and, under it, from the file that ``--config`` names.

    A flag may be written with dashes or underscores. A setting of the file is read as if it stood on the command line
    before all flags, so that its type is checked and a flag wins over it; and over what a run derived from the setting
    that the flag changes, see ``give_way``.

    Args:
        arguments: the words.
        prog: name of the program in the help text.

    Returns:
        Parsed.

    Raises:
        SystemExit: if a flag is unknown or has a bad value; the message is printed, with a hint.
        FileNotFoundError: if the file is not there.
        ValueError: if it holds no settings, or would have commands run that only it consents to.

    Example:
        >>> parse(["--lr", "0.1"]).derived
        ()
    """
    path, typed, values = _file_and_flags(arguments)
    derived = values.pop(DERIVED, [])
    values = give_way(values, derived, arguments)
    left = tuple(name for name in derived if name in values.keys() - typed.keys())
    words = _words(values)
    try:
        settings = _read([*words, *arguments], prog=prog)
    except SystemExit as error:
        if words and error.code:  # the message above shows no more than words, of which the user has not typed these
            shown = shlex.join(words).encode("utf-8", "backslashreplace").decode()
            print(f"(--config {path} is read as: {shown})", file=sys.stderr)
            for line in remedies(str(error.__context__), arguments):  # what settings say of themselves
                print(line, file=sys.stderr)
        raise
    _check_commands(settings, arguments)
    return Parsed(settings, left)


def _check_commands(settings: TrainSettings, arguments: Sequence[str]) -> None:
    """A file that came with data, or from a stranger, is not who consents to the commands that it names."""
    typed, data = typed_flags(arguments), settings.data
    if not data.allow_pipe_commands or "allow_pipe_commands" in typed:
        return
    for text in (*data.dataset_manifest, *data.val_manifest, *data.val_data):
        if "pipe:" in text and not any(word == text or word.endswith(f"={text}") for word in arguments):
            raise ValueError(
                f"--config {typed.get('config')} names {text!r} and allows itself to run commands; expected that on "
                "the command line. If you trust the file, give --allow-pipe-commands there"
            )


def code_of_file(arguments: Sequence[str]) -> list[str]:
    """Say that the recipe of a run is code in a file that the user has not typed.

    Args:
        arguments: the words of the command line.

    Returns:
        One line, or none: no ``--config``, another recipe, or one that was typed.

    Raises:
        FileNotFoundError, ValueError: as ``read_config``.

    Example:
        >>> code_of_file(["--recipe", "mine.py:recipe"])
        []
    """
    path, typed, values = _file_and_flags(arguments)
    recipe = values.get("recipe")
    is_code = isinstance(recipe, str) and ".py:" in recipe and "recipe" not in typed
    return [f"--config {path} names the recipe {recipe}, whose code runs"] if is_code else []


def kept_warnings(arguments: Sequence[str]) -> list[str]:
    """Warn of what stays of a run's file beside flags that it may follow from, where the file does not say ``derived``.

    Args:
        arguments: the words of the command line.

    Returns:
        One line, or none: no file, one that says it, or one that no run wrote.

    Raises:
        FileNotFoundError, ValueError: as ``read_config``.

    Example:
        >>> kept_warnings(["--steps", "60"])
        []
    """
    path, typed, values = _file_and_flags(arguments)
    if DERIVED in values or not is_of_a_run(values):
        return []
    filled = derived_names(flat_settings(TrainSettings()), values)
    left = give_way(values, filled, arguments)
    kept = [name for name in give_way(values, (), arguments) if name not in {*left, *typed}]
    if not kept:
        return []
    told = ", ".join(f"{flag_of(name)} {values[name]}" for name in kept)
    return [
        f"warning: --config {path} is of a version that did not write which settings a run derived, so it keeps "
        f"{told}, which may follow from what the command line changes. Give them there, too, or remove them from the "
        f"file to have them derived anew"
    ]


def remedies(message: str, arguments: Sequence[str]) -> list[str]:
    """Say how to leave out what a refusal wants left out, where the file of ``--config`` gives it and nobody typed it.

    Args:
        message: of the refusal, which names flags.
        arguments: the words of the command line.

    Returns:
        A line for each such setting.

    Raises:
        FileNotFoundError, ValueError: as ``read_config``.

    Example:
        >>> remedies("leave out --moe-top-k", ["--moe-top-k", "2"])
        []
    """
    if not re.search(r"\b[Ll]eave\b.*\bout\b", message, re.DOTALL):
        return []
    path, typed, values = _file_and_flags(arguments)
    values = give_way(values, values.pop(DERIVED, []), arguments)
    defaults, lines = flat_settings(TrainSettings()), []
    for flag in dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]*", message)):
        name = flag.removeprefix("--").replace("-", "_")
        default = defaults.get(name)
        if name in values.keys() & defaults.keys() - typed.keys() and values[name] not in (None, default, []):
            without = shlex.join(_words({name: default})) or f"{flag} None"
            lines.append(f"({shlex.join(_words({name: values[name]}))} is of --config {path}; {without} leaves it out)")
    return lines


def _file_and_flags(arguments: Sequence[str]) -> tuple[str | None, dict[str, str | None], dict[str, Any]]:
    """Return what ``--config`` names, the flags of a command line, and the file's settings, if there is one."""
    typed = typed_flags(arguments)
    path = typed.get("config")
    return path, typed, {} if path is None else read_config(Path(path))


def _read(words: list[str], *, prog: str | None) -> TrainSettings:
    try:
        return tyro.cli(TrainSettings, args=words, prog=prog)
    except ValueError as error:  # tyro before 1.0.16 lets pass what settings say of themselves; a later one prints it
        print(f"{prog or Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def read_config(path: Path) -> dict[str, Any]:
    """Read a file of settings, JSON or (by its suffix, .yaml or .yml) YAML: flag names, with dashes or underscores.

    Args:
        path: of the file.

    Returns:
        Name with underscores to value; in the file of a run, ``derived`` to the names of what nobody gave.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no JSON or YAML object of plain values.
        ModuleNotFoundError: if it is YAML and pyyaml is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file. A run writes its settings as config.json")
    values = _parse(path)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"--config {path}: expected an object of flag names and values, such as {{'steps': 100}}")
    for key, value in values.items():
        if key.replace("-", "_").strip("_") in _OF_A_LAUNCH:
            raise ValueError(f"--config {path}: {key!r} belongs on the command line and is no setting; remove it")
        items = value if isinstance(value, list) else [value]
        if not all(item is None or isinstance(item, str | int | float) for item in items):
            raise ValueError(f"--config {path}: {key} is {_shown(value)}; expected a number, a text, or a list of them")
        if key == DERIVED and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ValueError(
                f"--config {path}: {key} is {_shown(value)}; expected a list of names of settings that nobody gave, as "
                "a run writes it"
            )
    settings = {key.replace("-", "_"): value for key, value in values.items()}
    if DERIVED in settings:
        settings[DERIVED] = [name.replace("-", "_") for name in settings[DERIVED]]
    return settings


def _shown(value: Any) -> str:
    """Write the beginning of a value: aliases of YAML make few lines a structure without end."""
    shown = reprlib.repr(value)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix not in (".yaml", ".yml"):
            return json.loads(text)
        try:
            import yaml  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"--config {path}: YAML needs pyyaml; install it, or write JSON") from error
        return yaml.safe_load(text)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever the two parsers raise about the text
        raise ValueError(
            f"--config {path}: it is no {'YAML' if path.suffix in ('.yaml', '.yml') else 'JSON'}: {error}"
        ) from error


def _words(values: dict[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        flag = flag_of(name)
        if value is None or value == []:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            # a value may begin with -
            words += [flag, *map(_word, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return words


def _word(value: Any) -> str:
    """Write one of several values: a path that begins with - would be read as a flag."""
    return f"./{value}" if isinstance(value, str) and value.startswith("-") else str(value)
