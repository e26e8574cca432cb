#!/bin/sh
# MLflow's server over Postgres and an S3-compatible store, with a password for everyone.
#
# Secrets are files, so that they stand in no command line and in no list of environment variables:
#   POSTGRES_PASSWORD_FILE        of the user POSTGRES_USER
#   MLFLOW_ADMIN_PASSWORD_FILE    of MLflow's first user, MLFLOW_ADMIN_USERNAME; 12 characters at least
#   MLFLOW_SECRET_KEY_FILE        signs forms
#   S3_CREDENTIALS_FILE           an AWS credentials file, for the artifacts
# Others: POSTGRES_HOST, POSTGRES_PORT, POSTGRES_DB, MLFLOW_ARTIFACTS (s3://bucket/path), S3_ENDPOINT_URL,
# MLFLOW_ALLOWED_HOSTS (what a browser or a client may call this server), MLFLOW_HOST, MLFLOW_PORT, MLFLOW_WORKERS.
set -eu
umask 077

secret() { # FILE: its content
    if ! [ -s "$1" ]; then
        echo "serve.sh: the secret $1 is missing or empty" >&2
        exit 1
    fi
    tr -d '\n' < "$1"
}

: "${POSTGRES_HOST:?}" "${POSTGRES_USER:?}" "${POSTGRES_DB:?}" "${MLFLOW_ADMIN_USERNAME:?}" "${MLFLOW_ARTIFACTS:?}"
: "${MLFLOW_ALLOWED_HOSTS:?"the names that clients call this server by, for example mlflow:5000,localhost:5000"}"
: "${S3_CREDENTIALS_FILE:?}"

own=$(mktemp -d)
postgres_password=$(secret "${POSTGRES_PASSWORD_FILE:?}")
# In libpq's password file, a backslash and a colon are written with a backslash before them.
printf '*:*:*:*:%s\n' "$(printf '%s' "$postgres_password" | sed 's/[\\:]/\\&/g')" > "$own/pgpass"
unset postgres_password
database="postgresql+psycopg://$POSTGRES_USER@$POSTGRES_HOST:${POSTGRES_PORT:-5432}/$POSTGRES_DB"
cat > "$own/auth.ini" << END
[mlflow]
default_permission = READ
database_uri = $database
admin_username = $MLFLOW_ADMIN_USERNAME
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
grant_default_workspace_access = false
END

MLFLOW_AUTH_ADMIN_PASSWORD=$(secret "${MLFLOW_ADMIN_PASSWORD_FILE:?}")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret "${MLFLOW_SECRET_KEY_FILE:?}")
if [ "${#MLFLOW_AUTH_ADMIN_PASSWORD}" -lt 12 ]; then
    echo "serve.sh: MLflow's password has ${#MLFLOW_AUTH_ADMIN_PASSWORD} characters; it needs 12 at least" >&2
    exit 1
fi
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export PGPASSFILE="$own/pgpass" MLFLOW_AUTH_CONFIG_PATH="$own/auth.ini"
export MLFLOW_BACKEND_STORE_URI="$database" MLFLOW_ARTIFACTS_DESTINATION="$MLFLOW_ARTIFACTS"
export AWS_SHARED_CREDENTIALS_FILE="$S3_CREDENTIALS_FILE" AWS_EC2_METADATA_DISABLED=true
if [ -n "${S3_ENDPOINT_URL:-}" ]; then
    export MLFLOW_S3_ENDPOINT_URL="$S3_ENDPOINT_URL"
fi
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

ensure_bucket.py "$MLFLOW_ARTIFACTS" # a check too: nothing starts if the store cannot be reached
mlflow db upgrade "$database" # one process makes the tables; several at once would break them
exec mlflow server --host "${MLFLOW_HOST:-0.0.0.0}" --port "${MLFLOW_PORT:-5000}" --workers "${MLFLOW_WORKERS:-2}" \
    --app-name basic-auth --serve-artifacts --allowed-hosts "$MLFLOW_ALLOWED_HOSTS"
