"""Settings from a command line and a file, and back into a file."""

import dataclasses
import json
import re
import reprlib
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tyro

from moekit.lm.files import write_whole
from moekit.recipes.derived import OF_LENGTH, derived_names, give_way, typed_flags
from moekit.recipes.settings import ModelSettings, TrainSettings
from moekit.recipes.wording import flag_of, no_place

_NOT_WRITTEN = frozenset({"config", "resume", "describe", "world_size"})  # of one launch, not of the run
_RENAMED = {"preset": "model"}  # field to flag
# Flags that are no settings.
_OF_A_LAUNCH = frozenset({"config", "help", "h", "tyro_print_completion", "tyro_write_completion"})
_DERIVED = "derived"  # the key of a run's file that is no setting: names of those that nobody gave
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
    derived = values.pop(_DERIVED, [])
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
    if _DERIVED in values or not values.keys() >= set(OF_LENGTH):  # a run's file has them all, though some are null
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
    values = give_way(values, values.pop(_DERIVED, []), arguments)
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
        if key == _DERIVED and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise ValueError(
                f"--config {path}: {key} is {_shown(value)}; expected a list of names of settings that nobody gave, as "
                "a run writes it"
            )
    settings = {key.replace("-", "_"): value for key, value in values.items()}
    if _DERIVED in settings:
        settings[_DERIVED] = [name.replace("-", "_") for name in settings[_DERIVED]]
    return settings


def _shown(value: Any) -> str:
    """Write the beginning of a value: aliases of YAML make few lines a structure without end."""
    shown = reprlib.repr(value)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def flat_settings(settings: TrainSettings) -> dict[str, Any]:
    """List all settings by flag name, sorted, in plain values that JSON and text can hold.

    Args:
        settings: to list.

    Returns:
        Name to value; flags without effect are left out, unless they were given.

    Example:
        >>> flat = flat_settings(TrainSettings())
        >>> flat["moe_num_experts"], flat["model"], "trace" in flat
        (8, 'moekit_cpu', False)
    """
    groups = (getattr(settings, group.name) for group in dataclasses.fields(settings) if group.name != "legacy")
    values = {_RENAMED.get(name, name): value for group in groups for name, value in vars(group).items()}
    legacy = settings.legacy
    values |= {each.name: given for each in dataclasses.fields(legacy) if (given := getattr(legacy, each.name))}
    return {name: _plain(values[name]) for name in sorted(values)}


def unflatten(values: Mapping[str, Any]) -> TrainSettings:
    """Turn what ``flat_settings`` listed back into settings, for example those in a checkpoint.

    Args:
        values: name to value; what is left out takes its default.

    Returns:
        TrainSettings.

    Raises:
        ValueError: if a name is unknown or a value is bad.

    Example:
        >>> unflatten(flat_settings(TrainSettings())) == TrainSettings()
        True
    """
    try:
        return tyro.cli(TrainSettings, args=_words(dict(values)), console_outputs=False)
    except SystemExit as error:
        raise ValueError(f"these settings are not of this version of moekit: {dict(values)}") from error


def stored_model(values: Mapping[str, Any]) -> ModelSettings:
    """Pick a model's settings out of what ``flat_settings`` listed, as they are in a checkpoint.

    Args:
        values: name to value; others are left out, and what is not there takes its default.

    Returns:
        ModelSettings.

    Raises:
        ValueError: if a value is of another kind than the setting.

    Example:
        >>> stored_model({"model": "open_lm_41m", "moe_top_k": 4, "lr": 1e-3}).preset
        'open_lm_41m'
    """
    known, fields = {field.name for field in dataclasses.fields(ModelSettings)}, {v: k for k, v in _RENAMED.items()}
    given = {fields.get(name, name): value for name, value in values.items()}
    given = {name: value for name, value in given.items() if name in known}
    hints = get_type_hints(ModelSettings)
    for name, value in given.items():
        if not _is_of(value, hints[name]):
            raise ValueError(
                f"the checkpoint's settings say {_RENAMED.get(name, name)} = {value!r}, which is no value of that "
                f"setting; its state.json was changed or is damaged. Take another checkpoint"
            )
    return ModelSettings(**given)


def write_config(folder: Path, settings: TrainSettings, *, derived: Collection[str] = ()) -> Path:
    """Write a run's settings, resolved, as ``config.json``, which ``--config`` reads; and as OpenLM's ``params.txt``.

    Args:
        folder: of the run; made if need be.
        settings: of the run.
        derived: names of those that nobody gave, for ``config.json``.

    Returns:
        The path of ``config.json``.

    Raises:
        OSError: if the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(no_place(folder, error)) from error
    values = flat_settings(settings)
    write_whole(folder / "params.txt", "".join(f"{name}: {value}\n" for name, value in values.items()))
    kept = {name: value for name, value in values.items() if name not in _NOT_WRITTEN}
    kept |= {_DERIVED: [name for name in kept if name in derived]}
    return write_whole(folder / "config.json", json.dumps(kept, indent=1) + "\n")


def _is_of(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kinds = get_args(hint) or (hint,)
    also = (int,) if float in kinds else ()
    return isinstance(value, (*kinds, *also)) or (value is None and hint is not str)


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


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
