"""What stands between us and a service that is slow, failing or overloaded. One idea a file; `Fleet` joins them.

Who calls a service asks in this order: may one more request go there at all (`limit`, `breaker`), to which instance
(`instances`), and after a failure, whether to try once more (`retries`). See docs/resilience.md.
"""

from shared.resilience.breaker import CircuitBreaker
from shared.resilience.fleet import Fleet
from shared.resilience.instances import Instances
from shared.resilience.limit import AdaptiveLimit
from shared.resilience.retries import RetryBudget

__all__ = ["AdaptiveLimit", "CircuitBreaker", "Fleet", "Instances", "RetryBudget"]
