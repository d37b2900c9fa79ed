"""`python -m services.users [api|migrate]`."""

from services.users.app import SERVICE
from shared.runner import main

if __name__ == "__main__":
    main(SERVICE)
