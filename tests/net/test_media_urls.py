"""Media URLs in a text that people will read: nothing of them shows but their host."""

import pytest

from receiver.net.media_urls import conceal_urls

SIGNED = "https://media.example/a/b%20c.png?sig=1&t=2"


@pytest.mark.parametrize(
    ("url", "text", "shown"),
    [
        (SIGNED, f"404 for {SIGNED}", "404 for https://media.example/…"),
        (
            SIGNED,
            "Max retries exceeded with url: /a/b%20c.png?sig=1&t=2 (x)",
            "Max retries exceeded with url: /… (x)",
        ),
        (SIGNED, "GET /a/b%20c.png", "GET /…"),
        (SIGNED, "no /a/b c.png there", "no /… there"),
        (SIGNED, f"{SIGNED} {SIGNED}", "https://media.example/… https://media.example/…"),
        ("https://media.example/é/ü.png", "url: /%C3%A9/%C3%BC.png", "url: /…"),
        ("https://media.example/é/ü.png", "https://media.example/é/ü.png", "https://media.example/…"),
        (
            "https://media.example?key=12345",
            "at https://media.example?key=12345",
            "at https://media.example/…",
        ),
        (
            "https://media.example/1",
            "1 of 3 at https://media.example/1",
            "1 of 3 at https://media.example/…",
        ),
        ("https://media.example/", "https://media.example/ is down", "https://media.example/ is down"),
        ("no url but a secret", "he said: no url but a secret", "he said: /…"),
        ("http://[broken/media/1.png", "at http://[broken/media/1.png", "at http://[broken/…"),
        ("", "nothing to hide", "nothing to hide"),
    ],
)
def test_no_more_than_the_host_shows(url: str, text: str, shown: str) -> None:
    """The whole URL, its path as FLORA wrote it and as it is sent, with and without its query."""
    assert conceal_urls(text, [url]) == shown


def test_a_url_that_begins_another_leaves_no_rest() -> None:
    """The longest is replaced first."""
    urls = ["https://media.example/media/1", "https://media.example/media/1/large.png"]
    assert conceal_urls("/media/1/large.png and /media/1", urls) == "/… and /…"
