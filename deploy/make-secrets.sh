#!/usr/bin/env bash
# Makes the secrets that deploy/base refers to, with random values, in the namespace phisam. Nothing is written to a
# disk here. A secret that is there already stays as it is: its value is in use.
#
#   deploy/make-secrets.sh                                        for the S3-compatible store of overlays/kind
#   S3_ACCESS_KEY_ID=... S3_SECRET_ACCESS_KEY=... deploy/make-secrets.sh      for a store that you have
set -euo pipefail
namespace=phisam

random() { python3 -c 'import secrets; print(secrets.token_hex(32), end="")'; }

create() { # NAME, then KEY VALUE pairs; the values travel on standard input, not in a command line
    local name=$1
    shift
    if kubectl --namespace "$namespace" get secret "$name" > /dev/null 2>&1; then
        echo "make-secrets.sh: $name is there already and stays as it is"
        return
    fi
    printf '%s\0' "$name" "$namespace" "$@" | python3 -c '
import base64, json, sys
name, namespace, *rest = sys.stdin.read().split("\0")[:-1]
data = {key: base64.b64encode(value.encode()).decode() for key, value in zip(rest[::2], rest[1::2], strict=True)}
metadata = {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "phisam"}}
print(json.dumps({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": data}))
' | kubectl create --filename -
}

kubectl get namespace "$namespace" > /dev/null 2>&1 || kubectl apply --filename "$(dirname "$0")/base/namespace.yaml"
mlflow_password=$(random)
s3_key=${S3_ACCESS_KEY_ID:-phisam}
s3_secret=${S3_SECRET_ACCESS_KEY:-$(random)}
create phisam-postgres password "$(random)"
create phisam-s3 access-key-id "$s3_key" secret-access-key "$s3_secret" \
    credentials "$(printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$s3_key" "$s3_secret")"
create phisam-ray-token auth_token "$(random)"
# The server's and the runs' view of one password, made together; the runs' first, so that a script that died between the
# two is told by the second's absence.
if kubectl --namespace "$namespace" get secret phisam-mlflow > /dev/null 2>&1; then
    echo "make-secrets.sh: phisam-mlflow is there already and stays as it is"
else
    kubectl --namespace "$namespace" delete secret phisam-mlflow-client --ignore-not-found
    create phisam-mlflow-client \
        credentials "$(printf '[mlflow]\nmlflow_tracking_username = phisam\nmlflow_tracking_password = %s\n' "$mlflow_password")"
    create phisam-mlflow password "$mlflow_password" secret-key "$(random)"
fi
