"""Which output of a later read is which: the URLs of a settled run are taken over, its order is not.

A later read may list the outputs in another order, and output ids may repeat. An output whose
counterpart is in doubt keeps its URL: a download that fails is retried and reported, while one
output under two names would be a loss that looks like success. Pure.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from receiver.model import Output, unnamed_output_id


def refresh_outputs(stored: Sequence[Output], read: Sequence[Output]) -> tuple[Output, ...]:
    """Return the outputs of a settled run with the URLs that a later read has for them.

    They are matched by id where it is unique, else by id and type and what their values show. An
    empty id in `read` means that FLORA gave none.
    """
    groups = _to_groups(stored, read)
    fresh = {
        ours.position: theirs.value
        for group in groups
        for ours, theirs in _match(*group)
        if ours.type == theirs.type
    }
    return _without_shared_sources(stored, fresh)


def _to_groups(stored: Sequence[Output], read: Sequence[Output]) -> list[tuple[list[Output], list[Output]]]:
    """Return groups of outputs, stored and read, that may be each other's counterparts."""
    read_ids = Counter(output.output_id for output in read)
    # Where FLORA gives no id, the ledger has one that was made of the position.
    stored_ids = ["" if _is_unnamed(output, read_ids) else output.output_id for output in stored]
    counts = Counter(stored_ids)
    groups: dict[tuple[str, str], tuple[list[Output], list[Output]]] = defaultdict(lambda: ([], []))

    def key(output_id: str, output: Output) -> tuple[str, str]:
        is_unique = output_id and counts[output_id] == read_ids[output_id] == 1
        return output_id, "" if is_unique else output.type

    for output_id, output in zip(stored_ids, stored, strict=True):
        groups[key(output_id, output)][0].append(output)
    for output in read:
        groups[key(output.output_id, output)][1].append(output)
    return list(groups.values())


def _is_unnamed(output: Output, read_ids: Counter[str]) -> bool:
    return output.output_id == unnamed_output_id(output.position) and not read_ids[output.output_id]


def _match(stored: list[Output], read: list[Output]) -> Iterable[tuple[Output, Output]]:
    """Yield the pairs of a group that are certain: by what their values share, then what is left."""
    for part in (_value, _address, _path):
        ours, theirs = _by(part, stored), _by(part, read)
        for value, outputs in ours.items():
            found = theirs.get(value, [])
            is_certain = len(outputs) == len(found) == 1 or part is _value
            if value is None or not is_certain:
                continue
            for pair in zip(outputs, found, strict=False):
                stored.remove(pair[0])
                read.remove(pair[1])
                yield pair
    if len(stored) == len(read) == 1:
        yield stored[0], read[0]


def _by(part: Callable[[Output], str | None], outputs: Iterable[Output]) -> dict[str | None, list[Output]]:
    found: dict[str | None, list[Output]] = defaultdict(list)
    for output in outputs:
        found[part(output)].append(output)
    return found


def _value(output: Output) -> str | None:
    return output.value


def _address(output: Output) -> str | None:
    """Return a URL without its query, which may be a signature."""
    return None if output.is_text else output.value.partition("?")[0]


def _path(output: Output) -> str | None:
    """Return the path of a URL, which stays when files are served by another host."""
    try:
        return None if output.is_text else urlsplit(output.value).path.strip("/") or None
    except ValueError:
        return None


def _without_shared_sources(stored: Sequence[Output], fresh: dict[int, str]) -> tuple[Output, ...]:
    """Return the outputs with their fresh values, except one that would be another output's too."""
    while True:
        result = tuple(replace(each, value=fresh.get(each.position, each.value)) for each in stored)
        sources = Counter(each.value for each in result if not each.is_text)
        shared = [
            after.position
            for before, after in zip(stored, result, strict=True)
            if after.value != before.value and sources[after.value] > 1
        ]
        if not shared:
            return result
        for position in shared:
            del fresh[position]
