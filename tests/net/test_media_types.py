"""Content types: the first bytes tell, the server refines, and a page is no image."""

import io
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from receiver.model import Output, OutputType
from receiver.net.media_types import describe_mismatch, recognize


def an_output(kind: str = OutputType.IMAGE, url: str = "https://media.example/x") -> Output:
    return Output(0, "out", kind, url)


def picture(kind: str) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (8, 8)).save(made, kind)
    return made.getvalue()


MP4 = files("receiver.emulator").joinpath("video.mp4").read_bytes()
PNG = picture("PNG")
JPEG = picture("JPEG")
EBML = b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08B\x82\x84webmB\x87\x81\x02"
M4A = b"\0\0\0\x20ftypM4A \0\0\0\0M4A isomiso2"
HTML = b"<!DOCTYPE html>\n<html><title>Sign in</title>"
SVG = b'<?xml version="1.0"?>\n<!-- made by hand -->\n<!DOCTYPE svg [<!ENTITY a "b">]>\n<svg xmlns="x"/>'
SOUND, VIDEO, DOCUMENT = OutputType.AUDIO, OutputType.VIDEO, OutputType.DOCUMENT


@pytest.mark.parametrize(
    "stated", [None, "", "binary/octet-stream", "application/octet-stream", "image", "a/b, c/d"]
)
@pytest.mark.parametrize(
    ("head", "kind", "expected"),
    [
        (PNG, OutputType.IMAGE, "image/png"),
        (JPEG, OutputType.IMAGE, "image/jpeg"),
        (picture("GIF"), OutputType.IMAGE, "image/gif"),
        (picture("WEBP"), OutputType.IMAGE, "image/webp"),
        (picture("BMP"), OutputType.IMAGE, "image/bmp"),
        (picture("TIFF"), OutputType.IMAGE, "image/tiff"),
        (picture("AVIF"), OutputType.IMAGE, "image/avif"),
        (SVG, OutputType.IMAGE, "image/svg+xml"),
        (b"\xef\xbb\xbf\n<svg>", OutputType.IMAGE, "image/svg+xml"),
        (MP4, VIDEO, "video/mp4"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0", VIDEO, "video/quicktime"),
        (EBML, VIDEO, "video/webm"),
        (EBML, SOUND, "audio/webm"),
        (M4A, SOUND, "audio/mp4"),
        (b"RIFF\x24\0\0\0WAVEfmt ", SOUND, "audio/wav"),
        (b"RIFF\x24\0\0\0AVI LIST", VIDEO, "video/x-msvideo"),
        (b"ID3\x03\0\0\0\0\0\0" + bytes(100), SOUND, "audio/mpeg"),
        (b"\xff\xfb\x90\x00" + bytes(100), SOUND, "audio/mpeg"),
        (b"OggS\0\x02" + bytes(22) + b"\x01\x1eOpusHead", SOUND, "audio/ogg"),
        (b"fLaC\0\0\0\x22", SOUND, "audio/flac"),
        (b"%PDF-1.7\n", DOCUMENT, "application/pdf"),
        (b"PK\x03\x04\x14\0", DOCUMENT, "application/zip"),
        (HTML, OutputType.IMAGE, "text/html"),
        # In two bytes there is too little: they may begin a text as well.
        (b"BM is how this letter begins", DOCUMENT, None),
        (b"nothing of the kind", OutputType.IMAGE, None),
        (b"", OutputType.IMAGE, None),
    ],
)
def test_the_first_bytes_tell_what_the_server_does_not(
    head: bytes, kind: str, expected: str | None, stated: str | None
) -> None:
    """Missing, unspecific, malformed and contradictory types say nothing."""
    assert recognize(head, stated, an_output(kind)) == expected


@pytest.mark.parametrize(
    ("head", "stated", "expected"),
    [
        (PNG, "image/png", "image/png"),
        (PNG, "image/apng", "image/apng"),
        (PNG, "image/jpeg", "image/png"),
        (PNG, "text/html; charset=utf-8", "image/png"),
        (JPEG, "image/jpeg, image/jpeg", "image/jpeg"),
        (JPEG, "image/JPG; q=1", "image/JPG; q=1"),
        (JPEG, "image/jpeg;a=1,image/jpeg", "image/jpeg;a=1"),
        (MP4, "audio/mp4", "audio/mp4"),
        (EBML, "audio/webm; codecs=opus", "audio/webm; codecs=opus"),
        (
            b"PK\x03\x04\x14\0",
            "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
            "same",
        ),
        (b"PK\x03\x04\x14\0", "image/png", "application/zip"),
        (SVG, "application/xml", "image/svg+xml"),
        (b"glTF\x02\0\0\0", "model/gltf-binary", "model/gltf-binary"),
        (b'{"asset": {}}', "model/gltf+json", "model/gltf+json"),
        (b"no signature", "image/x-of-tomorrow", "image/x-of-tomorrow"),
        (b"BM and a text", "text/plain", "text/plain"),
        (b"\x00\x00\x01\x00 an icon, a film?", "image/png", "image/png"),
    ],
)
def test_the_server_refines_what_the_bytes_allow(head: bytes, stated: str, expected: str) -> None:
    """It knows which type of a format it is, and formats without a signature; its parameters stay."""
    assert recognize(head, stated, an_output()) == (stated if expected == "same" else expected)


@pytest.mark.parametrize(
    ("head", "stated", "kind", "url", "expected"),
    [
        (HTML, "text/html", OutputType.IMAGE, "/x", "an HTML page in place of an image"),
        (HTML, "image/png", OutputType.IMAGE, "/x", "an HTML page in place of an image"),
        (b" \r\n<html lang=en>", None, VIDEO, "/x", "an HTML page in place of a video"),
        (b"<!-- a --><BODY>", None, SOUND, "/x", "an HTML page in place of a sound"),
        (
            b"<?xml version='1.0'?><!DOCTYPE html PUBLIC 'x'>",
            None,
            SOUND,
            "/x",
            "an HTML page in place of a sound",
        ),
        (
            b"<h1>Bad gateway</h1>",
            "text/plain",
            OutputType.IMAGE,
            "/x",
            "an HTML page in place of an image",
        ),
        (
            b"<?xml version='1.0'?><Error><Code>",
            None,
            OutputType.IMAGE,
            "/x",
            "an XML document in place of an image",
        ),
        (
            b'{"error": "gone"}',
            "application/json",
            OutputType.IMAGE,
            "/x",
            "a JSON document in place of an image",
        ),
        (HTML, "text/html", DOCUMENT, "/x.pdf?sig=1", "an HTML page in place of application/pdf"),
        (HTML, "text/html", DOCUMENT, "/x.html", None),
        (HTML, "text/html", DOCUMENT, "/x", None),
        (HTML, "text/html", DOCUMENT, "//[", None),
        (b'{"nodes": []}', "application/json", DOCUMENT, "/scene.json", None),
        (SVG, "image/svg+xml", OutputType.IMAGE, "/x", None),
        (SVG, "application/xml", OutputType.IMAGE, "/x", None),
        (b"<?xml version='1.0'?><MPD>", "application/dash+xml", VIDEO, "/x", None),
        (b"#EXTM3U\n", "application/vnd.apple.mpegurl", VIDEO, "/x", None),
        (PNG, "text/html", OutputType.IMAGE, "/x", None),
        (MP4, "video/mp4", OutputType.IMAGE, "/x", None),
        (b"", None, OutputType.IMAGE, "/x", None),
    ],
)
def test_a_page_is_no_image(
    head: bytes, stated: str | None, kind: str, url: str, expected: str | None
) -> None:
    """Whatever it is called: servers send their error pages with status 200 too."""
    output = an_output(kind, f"https://media.example{url}")
    assert describe_mismatch(recognize(head, stated, output), output) == expected


@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.sampled_from(
                [b"<", b"<?", b"?>", b"<!--", b"-->", b"<!doctype x", b"[", b"]", b">", b"svg", b" "]
            )
        ).map(b"".join),
    ),
    st.one_of(st.none(), st.text(max_size=30), st.sampled_from(["a/b,,", ",", ";", "application/json"])),
    st.sampled_from([*OutputType, "somethingNewUrl"]),
)
def test_no_bytes_and_no_type_are_too_odd(head: bytes, stated: str | None, kind: str) -> None:
    """Both come from anywhere. The same again gives the same."""
    output = an_output(kind)
    content_type = recognize(head, stated, output)
    describe_mismatch(content_type, output)
    assert content_type == recognize(head, stated, output)


@pytest.mark.parametrize(
    "unit", [b"<??>", b"<!---->", b"<!doctype a[]>", b"<!--", b"<?", b"<!doctype a[", b"  <!-- -->"]
)
def test_markup_without_end_costs_no_time(unit: bytes) -> None:
    """A head of 4 KiB is read once: this test would not end otherwise."""
    recognize((unit * 4096)[:4096], None, an_output())
