#!/bin/sh
# What `make bench-gateway` needs besides the platform: nginx and wrk from the system, the peers in an environment of their own.
set -eu
cd "$(dirname "$0")"
if ! command -v nginx >/dev/null || ! command -v wrk >/dev/null; then
	command -v apt-get >/dev/null || { echo "bench: install nginx and wrk first (there is no apt-get here)" >&2; exit 1; }
	[ "$(id -u)" = 0 ] || { echo "bench: run as root once, or: apt-get install nginx-light wrk" >&2; exit 1; }
	apt-get update -q && apt-get install -qy --no-install-recommends nginx-light wrk
fi
[ -x .venv/bin/uvicorn ] || { "${PYTHON:-python3}" -m venv .venv && .venv/bin/pip install -q -r requirements.txt; }
