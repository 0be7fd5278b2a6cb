"""Values of `--input`, `--generate` and `--metadata`: JSON or YAML on the command line.

YAML is imported when a value is parsed, so that `--help` does not wait for it.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import typer

_INPUT_FIELDS = {"id", "type", "value"}


def parse_inputs(texts: Iterable[str]) -> list[Mapping[str, Any]]:
    """Return the inputs of a technique; each `--input` holds one input or a list of them."""
    return [row for text in texts for row in _parse_input(text)]


def parse_object(text: str | None, option: str) -> dict[str, Any] | None:
    """Return the JSON object in an option, None if the option was not given."""
    if text is None:
        return None
    found = _parse(text, option)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise typer.BadParameter(f"{option} is not an object like {{key: value}}")
    try:
        json.dumps(found)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"{option} holds what JSON cannot: put dates in quotes") from error
    return found


def _parse_input(text: str) -> list[Mapping[str, Any]]:
    found = _parse(text, "--input", keep_text=True)
    rows = found if isinstance(found, list) else [found]
    if not all(isinstance(row, dict) and row.keys() >= _INPUT_FIELDS for row in rows):
        example = "{id: prompt, type: text, value: a lighthouse}"
        raise typer.BadParameter(f"--input {text!r} is not like {example}")
    return rows


def _parse(text: str, option: str, *, keep_text: bool = False) -> Any:
    """Return the value; with `keep_text`, numbers and dates in YAML stay text."""
    import yaml

    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    loader = yaml.BaseLoader if keep_text else yaml.SafeLoader
    try:
        return loader(text).get_single_data()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise typer.BadParameter(f"{option} is neither JSON nor YAML: {text!r}") from error
