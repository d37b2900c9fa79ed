#!/usr/bin/env bash
# Runs once, when the primary's data directory is made: lets the streaming replicas in, each with a slot of its own.
set -euo pipefail
psql --quiet --set ON_ERROR_STOP=1 --set password="$REPLICATION_PASSWORD" \
  --set slots="${REPLICATION_SLOTS:-replica}" --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE replicator REPLICATION LOGIN PASSWORD :'password';
SELECT pg_create_physical_replication_slot(slot) FROM string_to_table(:'slots', ' ') AS slot;
SQL
echo "host replication replicator all scram-sha-256" >>"$PGDATA/pg_hba.conf"
