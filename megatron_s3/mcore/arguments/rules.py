"""The texts of ``--plugin-overrides``: settings for parameters whose names match a pattern."""

import argparse
from typing import Any

__all__ = ["ABOUT_OVERRIDES", "OVERRIDES", "rule_text", "rules"]

#: The destination of the flag, and the name of the configuration's field.
OVERRIDES = "plugin_overrides"

#: The help of the flag.
ABOUT_OVERRIDES = (
    "settings for the parameters whose names match a pattern, such as '*embedding*: "
    "optimizer=adamw lr=0.0003 beta2=0.95': another of the plugin's optimizers, its "
    "hyperparameters, and Megatron's lr, lr_mult, min_lr, weight_decay and wd_mult"
)

_FORM = "'PATTERN: NAME=VALUE ...', such as '*embedding*: optimizer=adamw lr=0.0003'"

_WORDS = {"true": True, "false": False, "none": None}


def rule_text(text: str) -> str:
    """Returns the text of a rule unchanged; the type of the flag's values.

    Raises:
        argparse.ArgumentTypeError: it does not have the form.
    """
    try:
        _parsed(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def rules(texts: Any) -> dict[str, dict[str, Any]]:
    """Returns the settings by pattern.

    Args:
        texts: the values of the flag, or None.

    Raises:
        ValueError: a text does not have the form, or two have the same pattern.
    """
    if isinstance(texts, str) or not isinstance(texts, list | tuple | None):
        raise ValueError(f"plugin_overrides must be a list of texts {_FORM}, not {texts!r}")
    found: dict[str, dict[str, Any]] = {}
    for text in texts or ():
        pattern, settings = _parsed(text)
        if pattern in found:
            raise ValueError(
                f"--plugin-overrides has two rules for the pattern {pattern!r}. Write one rule "
                "with all of its settings."
            )
        found[pattern] = settings
    return found


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    pattern, colon, rest = str(text).partition(":")
    pattern, words = pattern.strip(), rest.split()
    settings: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value) or name in settings:
            raise ValueError(
                f"--plugin-overrides {text!r}: {word!r} is "
                f"{'given twice' if name in settings else 'not NAME=VALUE'}; a rule is {_FORM}"
            )
        settings[name] = value if name == "optimizer" else _value(text, word, value)
    if not pattern or not colon or not words:
        raise ValueError(f"--plugin-overrides {text!r}: a rule is {_FORM}")
    return pattern, settings


def _value(text: str, word: str, value: str) -> Any:
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        return float(value)
    except ValueError:
        raise ValueError(
            f"--plugin-overrides {text!r}: {word!r} is neither a number nor true, false or none"
        ) from None
