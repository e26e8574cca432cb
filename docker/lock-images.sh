#!/usr/bin/env bash
# Writes the digest of each image in images.lock behind its tag. Needs docker with buildx, and the registries.
set -euo pipefail
lock=$(dirname "$0")/images.lock
new=$(mktemp)
trap 'rm -f "$new"' EXIT
while IFS= read -r line; do
    if [[ $line =~ ^([A-Z0-9_]+)=([^@]+)(@.*)?$ ]]; then
        name=${BASH_REMATCH[1]} image=${BASH_REMATCH[2]}
        digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$image")
        [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || { echo "lock-images.sh: no digest of $image: $digest" >&2; exit 1; }
        line="$name=$image@$digest"
    fi
    printf '%s\n' "$line"
done < "$lock" > "$new"
cat "$new" > "$lock"
