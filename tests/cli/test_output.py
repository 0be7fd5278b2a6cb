"""The output of commands: sizes and tables."""

import pytest

from receiver.cli.output import format_size, format_table


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 40, "3072.0 GiB"),
    ],
)
def test_sizes_have_a_readable_unit(size: int, words: str) -> None:
    assert format_size(size) == words


def test_a_tables_columns_are_as_wide_as_their_longest_cell() -> None:
    table = format_table(("run", "state"), [("run_1", "open"), ("run_22", "completed")])
    assert table.splitlines() == ["run     state", "run_1   open", "run_22  completed"]
