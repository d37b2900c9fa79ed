#!/bin/sh
# What a benchmark needs besides the platform: programs of the system, and the others' libraries in an environment of their own.
# usage: bench/setup.sh gateway|media
set -eu
cd "$(dirname "$0")"
case $1 in
gateway) programs="nginx wrk" packages="nginx-light wrk" ;;
media) programs=vipsthumbnail packages=libvips-tools ;;
esac
for program in $programs; do
	command -v "$program" >/dev/null && continue
	command -v apt-get >/dev/null || { echo "bench: install $programs first (there is no apt-get here)" >&2; exit 1; }
	[ "$(id -u)" = 0 ] || { echo "bench: run as root once, or: apt-get install $packages" >&2; exit 1; }
	# shellcheck disable=SC2086 # several
	apt-get update -q && apt-get install -qy --no-install-recommends $packages
	break
done
if ! cmp -s requirements.txt .venv/requirements.txt; then
	"${PYTHON:-python3}" -m venv .venv && .venv/bin/pip install -q -r requirements.txt && cp requirements.txt .venv/
fi
