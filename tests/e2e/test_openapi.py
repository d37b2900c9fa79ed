"""What the platform answers is what its OpenAPI document says, whatever is sent to it: no 5xx and no other shape."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Platform, administrator, photo

EXAMPLES = 5  # an operation and phase, besides those of the coverage phase, which makes some 25; every time the same
CONFIG = """
[checks]  # no schema says what an address or an image is, which passwords are common, which keys have been used
positive_data_acceptance.enabled = false
[[operations]]  # it has no end
include-path = "/api/v1/notifications/stream"
enabled = false
[[operations]]  # nothing would be left to examine
include-name = "DELETE /api/v1/users/me"
enabled = false
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("platform", [1], ids=["stage 1"], indirect=True)
async def test_the_platform_answers_as_its_document_says(platform: Platform, tmp_path: Path) -> None:
    """Through the gateway, by an administrator; each operation by itself, then several that follow from each other."""
    person = await administrator(platform)
    await person.until((await person.upload(photo(64, 48))).body["id"], "ready")
    path = tmp_path / "schemathesis.toml"
    path.write_text(CONFIG)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(path),
        "run", f"{person.base}/api/openapi.json", "--header", f"Authorization: Bearer {person.token}",
        "--max-examples", str(EXAMPLES), "--generation-deterministic", "--request-timeout", "10", "--no-color",
        "--workers", "2", "--phases", "coverage,fuzzing,stateful",
        cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    report = re.sub(r"eyJ[\w.-]+", "TOKEN", output.decode())
    assert process.returncode == 0, report
    print(report[report.rindex("SUMMARY") :])
