"""`python -m services.notifier [api|worker|migrate|rebuild]`."""

from services.notifier.app import SERVICE
from shared.runner import main

if __name__ == "__main__":
    main(SERVICE)
