"""The two buses: Kafka, and `BUS=inline`, which hands events to the handlers of this process.

Both take events from the same outbox and give them to the same `Consumer`, so moving from one to the other is
configuration.
"""

from shared.bus.inline import InlineBus
from shared.bus.kafka import KafkaBus

__all__ = ["InlineBus", "KafkaBus"]
