"""The operations API gets thousands of requests made from its OpenAPI document, other ones each time."""

import asyncio
import random
from pathlib import Path

import pytest

from tests.support.fuzz import fuzz_ops
from tests.support.stage import run_stage
from tests.web.ops.conftest import run_ops


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # hypothesis, about its own notes
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_no_request_breaks_the_api(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Each response is documented, and none is a 5xx. A failure shows the request, and the seed."""
    seed = random.randrange(2**32)
    async with run_stage(tmp_path) as stage:
        if kind == "postgres":
            stage.postgres = request.getfixturevalue("postgres_url")
        async with run_ops(stage, operations={"port": 0, "token": "t" * 40}) as ops:
            fuzz = await fuzz_ops(ops, tmp_path, examples=300, seed=seed, is_repeatable=False)
            found = await asyncio.to_thread(fuzz.run)
    print(f"\n{kind}, seed {seed}: {found.statuses}")  # noqa: T201 -- the figures are what a proof is for
    assert found.failures == {}
    assert found.operations == fuzz.operations
