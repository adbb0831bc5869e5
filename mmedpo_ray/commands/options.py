"""Options that several commands share, and the settings that the options of a command stand for."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmedpo_ray.config.tree import Config

# Option → the setting that it stands for.
_SETTING_OF = {"format": "data.format", "root": "data.root", "fail_on": "audit.fail_on"}


def add_settings_options(parser: ArgumentParser) -> None:
    """Adds ``--config``, ``key=value`` settings and the common options."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML with the settings that differ from the defaults"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, such as run.folder=DIR align.beta=0.2"
    )
    add_common_options(parser)


def add_common_options(parser: ArgumentParser) -> None:
    """Adds the options of every command."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--verbose", action="store_true", help="also show the log lines of libraries")


def settings_of(arguments: Namespace) -> Config:
    """The settings that a command names; those of an existing run if only its folder is given."""
    from mmedpo_ray.config.load import load

    path = arguments.config
    if path is None:
        for override in arguments.overrides:
            key, _, folder = override.partition("=")
            saved = Path(folder).expanduser() / "config.yaml"
            if key == "run.folder" and saved.is_file():
                path = saved
    given = {key: getattr(arguments, option, None) for option, key in _SETTING_OF.items()}
    return load(path, arguments.overrides, {key: value for key, value in given.items() if value is not None})
