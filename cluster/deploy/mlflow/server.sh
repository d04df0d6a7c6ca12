#!/usr/bin/env bash
# Starts MLflow's server with logins: what the container of compose.yaml runs, and what runs without a container just so.
#
# From the environment: MLFLOW_DATABASE_HOST, MLFLOW_DATABASE_USER and MLFLOW_DATABASE_NAME (mlflow), MLFLOW_DATABASE_PORT (5432);
# MLFLOW_ARTIFACTS_DESTINATION (s3://bucket/path) and what S3 wants (AWS_REGION, AWS_ENDPOINT_URL ...);
# MLFLOW_ADMIN_USERNAME (admin); MLFLOW_SERVER_HOST (127.0.0.1), MLFLOW_SERVER_PORT (5000).
# Files of MLFLOW_SECRETS (/run/secrets): database_password, admin_password (12 characters or more, of the first start),
# flask_secret_key (the same after each start), and, where they are not in the environment, s3_access_key and s3_secret_key.
set -euo pipefail
umask 077

fail() { echo "error: $1" >&2; exit 1; }
: "${MLFLOW_DATABASE_HOST:?is not set: the machine, or the folder of the socket, of PostgreSQL}"
: "${MLFLOW_ARTIFACTS_DESTINATION:?is not set: where files go, s3://bucket/path}"
secrets=${MLFLOW_SECRETS:-/run/secrets}
secret() { # NAME [LENGTH]
    [ -r "$secrets/$1" ] || fail "$secrets/$1: no such file; it holds the secret of that name (docs/clusters.md)"
    local value
    value=$(< "$secrets/$1")
    [ ${#value} -ge "${2:-1}" ] || fail "$secrets/$1: wanted at least ${2:-1} characters, found ${#value}"
    printf %s "$value"
}
# Read one by one, so that each one's failure ends the script. Passwords go by environment and files: command lines are for all
# to see.
PGPASSWORD=$(secret database_password)
MLFLOW_AUTH_ADMIN_PASSWORD=$(secret admin_password 12)
MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret flask_secret_key 16)
export PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_AUTH_ADMIN_USERNAME=${MLFLOW_ADMIN_USERNAME:-admin}
if [ -z "${AWS_ACCESS_KEY_ID:-}" ] && [ -e "$secrets/s3_access_key" ]; then
    AWS_ACCESS_KEY_ID=$(secret s3_access_key)
    AWS_SECRET_ACCESS_KEY=$(secret s3_secret_key)
    export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
fi
[ -n "${AWS_ENDPOINT_URL:-}" ] || unset AWS_ENDPOINT_URL # empty is no address to boto3

# A host that begins with / is the folder of a socket, which a URI holds as a parameter. The password is libpq's PGPASSWORD.
user=${MLFLOW_DATABASE_USER:-mlflow} name=${MLFLOW_DATABASE_NAME:-mlflow} port=${MLFLOW_DATABASE_PORT:-5432}
case $MLFLOW_DATABASE_HOST in
    /*) uri="postgresql+psycopg2://$user@/$name?host=$MLFLOW_DATABASE_HOST&port=$port" ;;
    *) uri="postgresql+psycopg2://$user@$MLFLOW_DATABASE_HOST:$port/$name" ;;
esac

# Who may do what is in the same database, in tables of its own. Without a login nobody sees anything (401); with one, runs of
# others can be read.
configuration=$(mktemp)
trap 'rm -f "$configuration"' EXIT
printf '[mlflow]\ndefault_permission = READ\ndatabase_uri = %s\nauthorization_function = %s\n' \
    "$uri" mlflow.server.auth:authenticate_request_basic_auth > "$configuration"
export MLFLOW_AUTH_CONFIG_PATH=$configuration MLFLOW_BACKEND_STORE_URI=$uri
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # seven processes for jobs of language models, which nobody here has

mlflow server --app-name basic-auth --artifacts-destination "$MLFLOW_ARTIFACTS_DESTINATION" \
    --host "${MLFLOW_SERVER_HOST:-127.0.0.1}" --port "${MLFLOW_SERVER_PORT:-5000}" --workers "${MLFLOW_SERVER_WORKERS:-2}" &
server=$!
trap 'kill -TERM $server 2> /dev/null || true' TERM INT
wait $server && status=0 || status=$?
while kill -0 $server 2> /dev/null; do wait $server && status=0 || status=$?; done
exit "$status"
