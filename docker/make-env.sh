#!/usr/bin/env bash
# Makes docker/.env from .env.example, with new random secrets, readable by you alone. Never overwrites one.
set -euo pipefail
cd "$(dirname "$0")"
if [[ -e .env ]]; then
    echo "make-env.sh: docker/.env is there already; its secrets are in use, so it stays as it is" >&2
    exit 1
fi
umask 077
while IFS= read -r line; do
    if [[ $line =~ ^([A-Z0-9_]+)=$ ]]; then
        line+=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
    fi
    printf '%s\n' "$line"
done < .env.example > .env.part
mv .env.part .env
echo "docker/.env is written. MLflow's user is ${MLFLOW_ADMIN_USERNAME:-phisam}; its password is in that file."
