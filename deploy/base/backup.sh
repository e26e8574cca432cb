#!/usr/bin/env bash
# backup.sh FOLDER: a dump of MLflow's database into FOLDER, checked to be readable; the newest KEEP (14) stay.
# PGHOST, PGPORT, PGUSER and PGDATABASE say where; POSTGRES_PASSWORD_FILE names a file with the password.
set -euo pipefail
umask 077
folder=${1:?"usage: backup.sh FOLDER"}
PGPASSFILE=$(mktemp)
export PGPASSFILE
part=$folder/.mlflow.dump.part
trap 'rm -f "$PGPASSFILE" "$part"' EXIT
printf '*:*:*:*:%s\n' "$(tr -d '\n' < "${POSTGRES_PASSWORD_FILE:?}" | sed 's/[\\:]/\\&/g')" > "$PGPASSFILE"
pg_dump --format=custom --file="$part"
pg_restore --list "$part" > /dev/null # a dump that cannot be read is no backup
dump=$folder/mlflow-$(date -u +%Y%m%dT%H%M%SZ).dump
mv "$part" "$dump"
find "$folder" -maxdepth 1 -name 'mlflow-*.dump' | sort -r | tail -n "+$((${KEEP:-14} + 1))" | xargs -r rm --
echo "backup.sh: $dump"
