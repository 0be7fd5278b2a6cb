"""How a loop waits between two ticks."""

import asyncio


async def either(first: asyncio.Event, second: asyncio.Event, seconds: float) -> None:
    """Wait for one of two events, or for `seconds` to pass."""
    waits = {asyncio.create_task(first.wait()), asyncio.create_task(second.wait())}
    try:
        await asyncio.wait(waits, timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
