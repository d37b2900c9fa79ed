#!/usr/bin/env bash
# Writes the secrets of a Compose project: random, readable by the owner only, never committed.
# usage: scripts/compose-env.sh FILE    keeps what the file already has and adds what is missing; - prints new ones
set -euo pipefail
file=$1
secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
names=(POSTGRES_PASSWORD REPLICATION_PASSWORD REDIS_PASSWORD USERS_SIGNING_KEY_SECRET LINK_SECRET MEDIA_URL_SECRET)
for folder in "$(dirname "$0")"/../services/*/migrations; do
  service=$(basename "$(dirname "$folder")")
  names+=("${service^^}_DATABASE_PASSWORD")
done

if [ "$file" = - ]; then
  for name in "${names[@]}"; do echo "$name=$(secret)"; done
  exit
fi
umask 077
[ -e "$file" ] || echo "# Made by make up. Passwords take effect when the data is made: keep this file as long as the volumes." >"$file"
for name in "${names[@]}"; do
  grep -q "^$name=" "$file" || echo "$name=$(secret)" >>"$file"
done
touch "$file"
