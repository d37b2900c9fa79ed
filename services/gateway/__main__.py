"""`python -m services.gateway [api]`."""

from services.gateway.app import SERVICE
from shared.runner import main

if __name__ == "__main__":
    main(SERVICE)
