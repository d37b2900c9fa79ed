"""Run in a process of its own, since logging is set up once for all."""

import json
import subprocess
import sys

PROGRAM = """
import logging
from shared import logs
logs.setup("things", "info")
log = logs.get_logger()
log.info("thing_made", number=1)
log.debug("not_shown")
logging.getLogger("aiokafka.cluster").error("Topic %s not found", "t")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
log.warning("odd", text="a\\udcff", number=2**80, keys={(1, 2): 3})
"""


def test_a_line_is_a_json_object_whoever_logs() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True, timeout=30)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stderr == b""
    assert [line["event"] for line in lines] == ["thing_made", "Topic t not found", "failed", "odd"]
    assert {line["service"] for line in lines} == {"things"}
    assert (lines[0]["number"], lines[1]["library"], lines[1]["level"]) == (1, "aiokafka.cluster", "error")
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert lines[3]["text"] == r"'a\udcff'"
