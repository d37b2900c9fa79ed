#!/usr/bin/env bash
# Copies the primary into an empty data directory, then follows it. The arguments are postgres's own.
set -euo pipefail
# Its slot on the primary, and its name there.
slot=${REPLICATION_SLOT:-replica}
export PGAPPNAME=$slot
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  chmod 0700 "$PGDATA"
  # A copy that was interrupted leaves files without PG_VERSION or with it written last: begin again from nothing.
  find "$PGDATA" -mindepth 1 -delete
  pg_basebackup --host "$PRIMARY_HOST" --username replicator --pgdata "$PGDATA" --slot "$slot" \
    --wal-method stream --write-recovery-conf --checkpoint fast --no-sync
fi
exec postgres "$@"
