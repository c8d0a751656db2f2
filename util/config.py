"""Where a flag's value comes from: command line > YAML file > caller's defaults > parser default.

A preset (`PresetAction`) stands for several flags. It is weaker than the other flags of the place that names it, the
command line or the file, and stronger than everything below that place.

Wherever a number comes from, it must lie in its flag's range (`util/ranges.py`).

A config file is a flat mapping from argument names (as they appear in the parsed namespace: `batch_size`, not
`--batch_size`) to values. It is checked against the parser as strictly as the command line is, and what `dump_yaml`
writes for a run can be given back as `--config`.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml

from util.output import write_text_atomic
from util.ranges import Range, Text, check_ranges
from util.read import read_text, short_path, short_repr

CONFIG_FLAG = "--config"
MAX_MESSAGE = 600  # characters
MAX_CHARACTERS = 10**6  # of a file of flags
_SWITCHES = (argparse._StoreTrueAction, argparse._StoreFalseAction, argparse.BooleanOptionalAction)

Expand = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]


@contextmanager
def told_as_flags(names: Iterable[str]) -> Iterator[None]:
    """A ValueError raised inside names these fields as the flags of the same names that they came from.

    Fields of one word (`head`) stay, since a message may mean the word.
    """
    fields = "|".join(name for name in names if "_" in name)
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(rf"(?<![\w-])({fields})\b", r"--\1", str(error))) from error


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and every default."""


class Parser(argparse.ArgumentParser):
    """Says every mistake in one line, with the flag that was meant, and takes no abbreviations."""

    def __init__(self, prog: str | None = None, description: str | None = None) -> None:
        super().__init__(prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but a mistyped flag is said before anything that it may be the cause of."""
        words = list(sys.argv[1:] if args is None else args)
        for action in self._actions:
            if isinstance(action, Switch) and action.was is not None:
                self._option_string_actions[f"--{action.was}"] = action
        for word, value in zip(words, [*words[1:], "--"], strict=False):
            if word == "--":
                break
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                close = difflib.get_close_matches(name, self._option_string_actions, n=1)
                given = word if value.startswith("--") else f"{word} {value}"
                self.error(f"unrecognized arguments: {given}" + (f"; did you mean {close[0]}?" if close else ""))
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        line = " ".join(message.split())
        shown = line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}..."
        self.exit(2, f"{self.prog}: error: {shown} (--help lists all flags)\n")


class Switch(argparse.BooleanOptionalAction):
    """--flag and --no-flag, so that the command line can undo a YAML file.

    was: an old name that is still understood, in files too, but not shown. was_negative: it says no.
    """

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        was: str | None = None,
        was_negative: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(option_strings, dest, **options)
        self.was, self.was_negative = was, was_negative

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.was is not None and option_string == f"--{self.was}":
            setattr(namespace, self.dest, not self.was_negative)
        else:
            super().__call__(parser, namespace, values, option_string)


class ConfigError(ValueError):
    """A config file that does not fit the parser. The message names the file, the key and the value."""


class PresetAction(argparse._StoreAction):
    """A flag whose value stands for values of other flags. `parse_args` alone knows what is said where, so it applies
    them: each becomes the default of its flag, unless the command line says it, or the file, where that names the
    preset. expand(value, defaults so far) gives the other flags' values by name."""

    def __init__(
        self, *args: Any, expand: Callable[[str, Mapping[str, Any]], Mapping[str, Any]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.expand = expand


def parse_checked(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    rules: Sequence[argparse.Action] | None = None,
) -> argparse.Namespace:
    """`parser.parse_args`, for programs without --config. SystemExit with one line if a value is out of range.

    rules: the flags as they were before a file changed their defaults; an empty text means none where that is the
    flag's own default.
    """
    args = parser.parse_args(argv)
    try:
        check_ranges(parser._actions if rules is None else rules, vars(args))
    except ValueError as error:
        raise SystemExit(f"{parser.prog}: error: {error}") from error
    return args


def parse_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Parses `argv` (default: sys.argv[1:]), taking defaults from the YAML file named by --config, if one is named.

    defaults: values, by name, that stand in for the parser's own defaults.
    --config is added to the parser if it has none. The parser itself is left as it was. As for every other mistake on
    the command line, a bad file ends the program with status 2 and one message (`parser.error`). A number out of its
    flag's range ends it with status 1 and one line.
    """
    rules = parser._actions
    parser = copy.deepcopy(parser)
    parser.set_defaults(**(defaults or {}))
    if CONFIG_FLAG not in parser._option_string_actions:
        parser.add_argument(CONFIG_FLAG, metavar="YAML", help="file with defaults; the command line wins")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(CONFIG_FLAG)
    presets = [action for action in parser._actions if isinstance(action, PresetAction)]
    for action in presets:
        finder.add_argument(*action.option_strings)
    found = vars(finder.parse_known_args(argv)[0])
    in_file: Mapping[str, Any] = {}
    if found["config"] is not None:
        try:
            in_file = set_defaults_from_yaml(parser, found["config"])
        except ConfigError as error:
            parser.error(str(error))
    for action in presets:
        _apply_preset(parser, action, found[action.dest], in_file)
    return parse_checked(parser, argv, rules)


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> set[str]:
    """The names of the options that the command line or its YAML file says, to whatever value, once `parse_args` has
    accepted them. What a preset sets does not count, its own name does."""
    silent = copy.deepcopy(parser)
    for action in silent._actions:
        action.default, action.required = argparse.SUPPRESS, False
    said = vars(silent.parse_args(argv))
    return set(said) | set(load_yaml(said["config"]) if said.get("config") else {})


def resolved_dict(args: argparse.Namespace) -> dict[str, Any]:
    """Every argument's final value by name, without `config` (its values are in). ValueError if one is not plain."""
    values = {name: value for name, value in sorted(vars(args).items()) if name != "config"}
    for name, value in values.items():
        entries = value if isinstance(value, list) else [value]
        if not all(type(entry) in (type(None), bool, int, float, str) for entry in entries):
            raise ValueError(f"argument {name} is not a plain value: {value!r}")
    return values


def dump_yaml(values: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes plain values as YAML, in the mapping's order, whole or not at all. Missing folders are made."""
    write_text_atomic(Path(path), yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file ({} for an empty one). Raises ConfigError for anything else, and for repeated keys."""
    try:
        text = read_text(path, "config file")
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"config file {short_path(path)} has {len(text)} characters, at most {MAX_CHARACTERS} are read"
        )
    try:
        values = yaml.load(text, Loader=_PlainLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"config file {short_path(path)} is not YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ConfigError(f"config file {short_path(path)} must be a mapping of argument names, it is a {kind}")
    return values


class _PlainLoader(yaml.SafeLoader):
    """Refuses repeated keys, and aliases: a few lines of them can stand for more than fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"alias *{event.anchor} is not taken", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if str(key) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key} is there twice", problem_mark=key_node.start_mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)


def _apply_preset(
    parser: argparse.ArgumentParser, action: PresetAction, on_command_line: str | None, in_file: Mapping[str, Any]
) -> None:
    """Sets the defaults of the preset that is named on the command line or else by the parser (or its file)."""
    name = on_command_line or parser.get_default(action.dest)
    if action.choices is not None and name not in action.choices:
        return  # the parser will say so
    defaults = {other.dest: parser.get_default(other.dest) for other in parser._actions}
    values = action.expand(name, defaults)
    kept = in_file if on_command_line is None else {}
    parser.set_defaults(**{key: value for key, value in values.items() if key not in kept})


def set_defaults_from_yaml(parser: argparse.ArgumentParser, path: str) -> Mapping[str, Any]:
    """Makes the file's values the parser's defaults, and gives them by today's names. Raises ConfigError."""
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    actions.pop("config", None)
    actions.pop("help", None)
    values = _renamed(load_yaml(path), actions, path)
    for key, value in values.items():
        if key == "config":
            raise ConfigError(
                f"config file {path}: config files do not include one another (config: {short_repr(value)})"
            )
        if key not in actions:
            close = difflib.get_close_matches(str(key), list(actions), n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise ConfigError(f"config file {path}: unknown key {_key(key)} (value {short_repr(value)}){hint}")
        try:
            converted = _convert(actions[key], value)
        except (TypeError, ValueError, OverflowError, argparse.ArgumentTypeError) as error:
            raise ConfigError(f"config file {path}: {key}: {short_repr(value)}: {error}") from error
        try:
            check_ranges([actions[key]], {key: converted})
        except ValueError as error:
            raise ConfigError(f"config file {path}: {error}") from error
        parser.set_defaults(**{key: converted})
        actions[key].required = False
    return values


def _renamed(values: Mapping[str, Any], actions: Mapping[str, argparse.Action], path: str) -> dict[str, Any]:
    """The values by field; old names of switches may say the opposite, other flags may have several names."""
    old: dict[str, argparse.Action] = {
        action.was: action for action in actions.values() if isinstance(action, Switch) and action.was is not None
    }
    for action in actions.values():
        if not isinstance(action, _SWITCHES):
            names = [option.removeprefix("--") for option in action.option_strings]
            old |= {name: action for name in names if name != action.dest}
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        found = old.get(key) if isinstance(key, str) else None
        name = key if found is None else found.dest
        if name in renamed:
            raise ConfigError(f"config file {path}: {key} is another name of {name}, which is there too")
        is_opposite = isinstance(found, Switch) and found.was_negative
        renamed[name] = not value if is_opposite and isinstance(value, bool) else value
    return renamed


def _convert(action: argparse.Action, value: Any) -> Any:
    """`value` as the action would have stored it. Raises TypeError or ValueError saying what was expected."""
    takes_none = isinstance(action.type, Range) and action.type.takes_none
    if value is None and (action.default is None or takes_none):
        return None
    if isinstance(action, _SWITCHES):
        if not isinstance(value, bool):
            raise TypeError("expected true or false")
        return value
    if not isinstance(action, argparse._StoreAction):
        raise TypeError("can only be given on the command line")
    if action.nargs in (None, "?"):
        return _convert_scalar(action, value)
    if not isinstance(value, list):
        raise TypeError("expected a list")
    if (action.nargs == "+" and not value) or (isinstance(action.nargs, int) and len(value) != action.nargs):
        raise ValueError(f"expected {'at least one' if action.nargs == '+' else action.nargs} values, got {len(value)}")
    return [_convert_scalar(action, entry) for entry in value]


def _convert_scalar(action: argparse.Action, value: Any) -> Any:
    converter: Any = action.type.kind if isinstance(action.type, Range | Text) else action.type
    converted: Any
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"expected a {_type_name(converter)}, got {type(value).__name__}")
    if converter in (None, str):
        if not isinstance(value, str):
            raise TypeError(f"expected a string, got {type(value).__name__} (quote it)")
        converted = value
    elif converter is int:
        if not isinstance(value, int):
            raise TypeError(f"expected an int, got {type(value).__name__}")
        converted = value
    else:  # float also reads "1e-4", which YAML takes for a string
        converted = converter(value if converter is float else str(value))
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"choose from {', '.join(map(str, action.choices))}")
    return converted


def _key(key: Any) -> str:
    return key if isinstance(key, str) and key.isprintable() and len(key) < 100 else short_repr(key)


def _type_name(converter: Any) -> str:
    return "string" if converter is None else getattr(converter, "__name__", "value")
