"""`python -m services.users [api|migrate|create-admin EMAIL|rotate-keys]`."""

from services.users.app import SERVICE
from shared.runner import main

if __name__ == "__main__":
    main(SERVICE)
