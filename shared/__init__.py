"""The platform library: what every service stands on, one idea a file. It imports nothing from `services`."""
