"""`python -m services.media [api|worker|migrate]`."""

from services.media.app import SERVICE
from shared.runner import main

if __name__ == "__main__":
    main(SERVICE)
