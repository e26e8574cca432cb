#!/usr/bin/env bash
# restore.sh DUMP: MLflow's database as it was when backup.sh made DUMP. All or nothing; what came later is gone.
# Stop MLflow first (kubectl scale deployment mlflow --replicas 0): a server that writes meanwhile would wait for it.
# Environment: as for backup.sh.
set -euo pipefail
umask 077
dump=${1:?"usage: restore.sh DUMP"}
PGPASSFILE=$(mktemp)
export PGPASSFILE
trap 'rm -f "$PGPASSFILE"' EXIT
printf '*:*:*:*:%s\n' "$(tr -d '\n' < "${POSTGRES_PASSWORD_FILE:?}" | sed 's/[\\:]/\\&/g')" > "$PGPASSFILE"
pg_restore --dbname="${PGDATABASE:?}" --clean --if-exists --no-owner --single-transaction "$dump"
echo "restore.sh: the database is that of $dump"
