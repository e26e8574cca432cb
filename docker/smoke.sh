#!/usr/bin/env bash
# One training step in the image: smoke.sh IMAGE. It needs no network, and leaves nothing.
set -euo pipefail
image=${1:?"usage: smoke.sh IMAGE"}
docker run --rm --network none --user 1000:100 --cap-drop ALL --security-opt no-new-privileges --shm-size 1g \
    --env PHISAM_HOME=/tmp/runs --workdir /tmp "$image" \
    phisam train digits-frob --set training.epochs=1 --set data.fraction=0.2 --num-workers 2
# With all of Docker's usual rights, so that it is the image alone that keeps its user from becoming root.
docker run --rm --network none --user 1000:100 "$image" \
    sh -c '! sudo -n true 2> /dev/null && test "$(id -u)" = 1000'
echo "smoke.sh: $image trained, as a user who cannot become root"
