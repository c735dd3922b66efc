"""The `qlm` command: arguments, help, and how mistakes are told.

A mistake a user can make ends in one line on standard error, ``qlm: error: ...``, and exit code 2; an
episode that failed in exit code 1; Ctrl-C (or SIGTERM) in 130. ``QLM_DEBUG=1`` or ``HYDRA_FULL_ERROR=1``
shows the traceback instead.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import qlm_env
from qlm_env.spec import ConfigError
from runners.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, CommandFailed, CommandInterrupted

if TYPE_CHECKING:
    from runners.commands import Command

DEBUG_VARIABLES = ("QLM_DEBUG", "HYDRA_FULL_ERROR")
FLAGS = ("-h", "--help", "-m", "--multirun", "--cfg", "--config-dir")
SWITCHES = {"--quick": "quick=true"}
"""Flags that stand for a setting."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qlm` with ``argv`` (default: the command line) and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    # A batch system ends a job with SIGTERM; like Ctrl-C, it should stop the workers too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    debug = any(os.environ.get(name) == "1" for name in DEBUG_VARIABLES)
    try:
        _dispatch(arguments)
    except ConfigError as error:
        return _end(error, EXIT_USAGE, debug)
    except CommandFailed as error:
        return _end(error, EXIT_FAILED, debug)
    except CommandInterrupted as error:
        return _end(error, EXIT_INTERRUPTED, debug)
    except OSError as error:
        # No permission, no space, a name that is no file: for the user to solve, in any command.
        return _end(error, EXIT_USAGE, debug, f"cannot use '{error.filename}': {error.strerror}")
    except KeyboardInterrupt:
        print("qlm: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _end(error: Exception, code: int, debug: bool, message: str = "") -> int:
    if debug:
        raise error
    label = "qlm" if code == EXIT_INTERRUPTED else "qlm: error"
    print(f"{label}: {' '.join((message or str(error)).split())}", file=sys.stderr)
    return code


@dataclass(frozen=True)
class _Arguments:
    """A command line taken apart."""

    words: tuple[str, ...]
    overrides: tuple[str, ...]
    help: bool
    multirun: bool
    cfg: bool
    config_dir: Path | None


def _dispatch(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        print(f"qlm {qlm_env.__version__}")
        return
    # What follows loads Hydra, for which the version need not wait.
    from runners import help_texts
    from runners.commands import COMMANDS
    from runners.composition import Request

    if not arguments or arguments in (["-h"], ["--help"], ["help"]):
        print(help_texts.overview())
        return
    given = _split(arguments)
    name = _command_name(given, COMMANDS)
    command = COMMANDS[name]
    if given.help:
        print(help_texts.command_help(name, command, given.config_dir))
        return
    request = Request(
        command.config_name, (*_words_as_setting(given, name, command.words), *given.overrides), given.config_dir
    )
    if given.multirun:
        if command.merge is None:
            raise ConfigError(f"qlm {name} takes no -m")
        from runners.multirun import run_jobs

        run_jobs(name, command, request)
        return
    values = request.compose()
    config = command.parse(values)
    if given.cfg:
        import yaml

        print(yaml.safe_dump(values, sort_keys=False), end="")
        return
    command.run(config)


def _split(arguments: list[str]) -> _Arguments:
    words: list[str] = []
    overrides: list[str] = []
    flags: set[str] = set()
    config_dir: Path | None = None
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag == "--config-dir":
            folder = value if equals else next(rest, "")
            if not folder:
                raise ConfigError("--config-dir: name a folder")
            config_dir = Path(folder)
        elif argument.startswith("-"):
            if argument in FLAGS:
                flags.add(argument)
                continue
            if argument in SWITCHES:
                overrides.append(SWITCHES[argument])
                continue
            # `--key value` and `--key=value` are `key=value` to those whom other tools have taught so.
            given = value if equals else next(rest, "")
            if not flag.startswith("--") or not given or given.startswith("-"):
                raise ConfigError(
                    f"unknown option '{argument}'; allowed: {', '.join((*FLAGS, *SWITCHES))}, or key=value"
                )
            overrides.append(f"{flag.removeprefix('--').replace('-', '_')}={given}")
        elif equals or overrides or argument.startswith(("~", "+")):
            overrides.append(argument)
        else:
            words.append(argument)
    return _Arguments(
        words=tuple(words),
        overrides=tuple(overrides),
        help=not flags.isdisjoint({"-h", "--help"}),
        multirun=not flags.isdisjoint({"-m", "--multirun"}),
        cfg="--cfg" in flags,
        config_dir=config_dir,
    )


def _words_as_setting(given: _Arguments, name: str, key: str) -> list[str]:
    """The words behind a command's name as an override of ``key``: a value, or a list of several."""
    words = [_quoted(word) for word in given.words[len(name.split()) :]]
    if not words:
        return []
    return [f"{key}={words[0]}" if len(words) == 1 else f"{key}=[{','.join(words)}]"]


def _quoted(word: str) -> str:
    """A word as Hydra takes it literally, whatever characters a path has."""
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _command_name(given: _Arguments, commands: Mapping[str, Command]) -> str:
    from runners.composition import hint

    names = list(commands)
    first = sorted({name.partition(" ")[0] for name in names})
    if not given.words:
        raise ConfigError(f"no command; allowed: {', '.join(first)}")
    if given.words[0] not in first:
        raise ConfigError(
            f"unknown command '{given.words[0]}'; allowed: {', '.join(first)}{hint(given.words[0], first)}"
        )
    for length in (1, 2):
        name = " ".join(given.words[:length])
        if name in names:
            for word in () if commands[name].words else given.words[length:]:
                raise ConfigError(f"malformed override '{word}': expected key=value")
            return name
    second = [name.partition(" ")[2] for name in names if name.startswith(f"{given.words[0]} ")]
    if len(given.words) == 1:
        raise ConfigError(f"qlm {given.words[0]} needs one of: {', '.join(second)}")
    raise ConfigError(
        f"unknown command 'qlm {given.words[0]} {given.words[1]}'; allowed: {', '.join(second)}"
        f"{hint(given.words[1], second)}"
    )
