"""What an API key, a signing secret or a token may consist of, whatever it is read from. Pure.

FLORA's keys and secrets, and the token of the operations listener, are printable ASCII without
white space or quotation marks: anything else was added on the way, by an editor, by a shell or by
`--env-file`, and no header can hold it. Settings, commands and the client ask `find_fault`, so that
they agree. The answer never contains the value.
"""

import re

__all__ = ["describe_character", "find_fault", "split_list"]

_QUOTES = frozenset(
    "\"'`\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\u300c\u300d\uff02\uff07"
)
_INVISIBLE = frozenset(
    "\u00ad\u180e\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u2060\u2061\u2062\u2063\u2064\ufeff"
)
_BYTE_ORDER_MARK = "\ufeff"
_PREFIX = re.compile(r"whsec_|sk_live_|sk_test_")
_SEPARATOR = re.compile(r"(?<=\S)\s*[,;\r\n][\s,;]*(?=\S)")


def find_fault(value: str) -> str | None:
    """Return what is odd about a key, a secret or a token, as the end of a sentence, or None."""
    if not value.strip():
        return "is empty"
    if value != value.strip():
        return "has white space around it; remove the newline or space that was copied"
    if value[0] == _BYTE_ORDER_MARK:
        return "begins with a byte order mark (U+FEFF), which an editor has added; remove it"
    for place, character in enumerate(value, 1):
        if "!" <= character <= "~" and character not in _QUOTES:
            continue
        return f"has {describe_character(character)} {_describe_place(place, value)}; {_advise(character)}"
    if len(_PREFIX.findall(value)) > 1:
        return "holds more than one key or secret; separate secrets with commas"
    return None


def split_list(text: str) -> list[str]:
    """Split several secrets in one text at commas, semicolons and line breaks.

    White space around the whole text stays, for `find_fault` to report.
    """
    return _SEPARATOR.split(text)


def describe_character(character: str) -> str:
    """Return what kind of character this is, with its code point where it cannot be seen."""
    code = f"(U+{ord(character):04X})"
    if character in {"\r", "\n"}:
        return "a line break"
    if character.isspace():
        return f"white space {code}"
    if character in _QUOTES:
        return f"a quotation mark {code}"
    if character in _INVISIBLE:
        return f"an invisible character {code}"
    if character < " " or character == "\x7f":
        return f"a control character {code}"
    return f"a character that is not ASCII {code}"


def _describe_place(place: int, value: str) -> str:
    if place == 1:
        return "at its beginning"
    return "at its end" if place == len(value) else "inside"


def _advise(character: str) -> str:
    if character in {"\r", "\n"}:
        return "it must be one line, without a comment"
    if character.isspace():
        return "separate several secrets with commas, and copy each without spaces"
    if character in _QUOTES:
        return "remove it: Docker's --env-file, for example, keeps quotation marks as part of a value"
    return "copy the value again, as plain text"
