"""Stand-ins for tunnel programs: they print what the real ones print, and forward bytes."""

import sys
from pathlib import Path

from tests.support.stage import eventually

CLOUDFLARED = """
if sys.argv[1:3] != ["tunnel", "--no-autoupdate"] or "--url" not in sys.argv:
    sys.exit("unexpected arguments: " + " ".join(sys.argv[1:]))
say("2026-11-24T06:00:00Z INF Thank you for trying Cloudflare Tunnel. See https://developers.cloudflare.com/cloudflare-one")
say("2026-11-24T06:00:00Z INF Requesting new quick Tunnel on trycloudflare.com...")
say('2026-11-24T06:00:00Z ERR retrying: Post "https://api.trycloudflare.com/tunnel": EOF')
say("2026-11-24T06:00:01Z INF +" + "-" * 92 + "+")
say("2026-11-24T06:00:01Z INF |  Your quick Tunnel has been created! Visit it at (it may take some time to be reachable):|")
say("2026-11-24T06:00:01Z INF |  https://four-plain-made-words.trycloudflare.com                              |")
say("2026-11-24T06:00:01Z INF +" + "-" * 92 + "+")
say("2026-11-24T06:00:01Z INF Registered tunnel connection connIndex=0 connection=0c2f location=fra03 protocol=quic")
time.sleep(3600)
"""
FORWARDER = """
to = int(sys.argv[1])

async def pipe(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()

async def serve(reader, writer):
    try:
        there, back = await asyncio.open_connection("127.0.0.1", to)
    except OSError:
        writer.close()
        return
    await asyncio.gather(pipe(reader, back), pipe(there, writer))

async def main():
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    server = await asyncio.start_server(serve, "127.0.0.1", port)
    say(f"pid {os.getpid()}")
    say(f"\\x1b[32mlistening\\x1b[0m at https://127.0.0.1:{server.sockets[0].getsockname()[1]}/ now")
    async with server:
        await server.serve_forever()

asyncio.run(main())
"""
_HEAD = """#!{python}
import asyncio, os, sys, time
def say(text):
    print(text, file=sys.stderr, flush=True)
"""


def write_program(directory: Path, name: str, body: str) -> Path:
    """Write an executable program and return its path."""
    path = directory / name
    path.write_text(_HEAD.format(python=sys.executable) + body)
    path.chmod(0o755)
    return path


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def wait_until_gone(pid: int) -> None:
    async def look() -> bool:
        return not is_alive(pid)

    await eventually(look)
