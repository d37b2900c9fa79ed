"""The gateway's way through alone, for `bench/gateway.py`: it limits nobody, and leaves nothing in metrics and log."""

from collections.abc import Callable

from services.gateway import app
from services.gateway.limits import Limits, Standing
from services.gateway.upstreams import RouteClass
from shared import middleware
from shared.auth import Principal
from shared.limits import Decision
from shared.runner import main


class NoLimits(Limits):
    def ask(
        self, route_class: RouteClass, principal: Principal | None, address: str, tell: Callable[[Standing], None]
    ) -> None:
        tell(Standing(self._classes[route_class], Decision(True, 1, 0, 0)))


def record_nothing(*_: object) -> None:
    """In the place of `middleware.record`."""


if __name__ == "__main__":
    vars(app)["Limits"] = NoLimits
    vars(middleware)["record"] = record_nothing
    main(app.SERVICE)
