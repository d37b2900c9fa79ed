#!/usr/bin/env bash
# Installs PgBouncer from Debian's (or Ubuntu's) package, for DATABASE=pgbouncer make test-integration.
# exit status: 0 it is there; 2 it cannot be had here, and why
set -euo pipefail
PATH=$PATH:/usr/sbin
command -v pgbouncer >/dev/null && exit
command -v apt-get >/dev/null || { echo "There is no apt-get here: install PgBouncer by other means, or name it in PGBOUNCER" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "Installing a package needs root: sudo scripts/pgbouncer.sh" >&2; exit 2; }
apt-get update -qq || true
# The package starts a server of its own, which nobody asked for.
RUNLEVEL=1 apt-get install -y -qq --no-install-recommends pgbouncer >/dev/null ||
  { echo "The package pgbouncer cannot be installed (see above)" >&2; exit 2; }
pgbouncer --version | head -n 1
