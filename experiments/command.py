"""The grammar of the suite's commands: settings as KEY=VALUE words and flags, in any order."""

import argparse
from collections.abc import Iterable
from typing import NoReturn

from cpdlm.config import ConfigError, check_words
from cpdlm.config.words import nearest
from cpdlm.terminal import Parser


class Command(Parser):
    """Flags as argparse has them. `settings` of the result are the other words; a mistake raises ConfigError."""

    def __init__(self, program: str, description: str | None, settings: str = "settings (--help lists them)") -> None:
        style = argparse.RawDescriptionHelpFormatter
        usage = f"{program} [KEY=VALUE]... [OPTIONS]"
        super().__init__(program, usage, description, formatter_class=style, allow_abbrev=False)
        self.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=settings)

    def read(self, arguments: list[str]) -> argparse.Namespace:
        check_words(arguments)
        return self.parse_intermixed_args(arguments)

    def error(self, message: str) -> NoReturn:
        words = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        known = [flag for action in self._actions for flag in action.option_strings]
        guess = "".join(nearest(word, known) for word in words if word not in known)
        raise ConfigError(f"{message}{guess}")


def pairs(words: Iterable[str], known: Iterable[str], prefix: str = "") -> dict[str, str]:
    """KEY=VALUE words as a dict; a key is one of `known` or begins with `prefix`. Raises ConfigError."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not (key in known or (prefix and key.startswith(prefix))):
            guess = nearest(key, known, "{}=")
            raise ConfigError(f"'{word}': write KEY=VALUE with one of {', '.join(known)}{guess} (--help explains them)")
        if not value:
            raise ConfigError(f"{key}= needs a value")
        found[key] = value
    return found


def one_of(key: str, value: str, allowed: Iterable[str]) -> str:
    """The value; raises ConfigError where it is not allowed."""
    if value not in allowed:
        raise ConfigError(f"{key}={value}: not one of {', '.join(allowed)}{nearest(value, allowed)}")
    return value
