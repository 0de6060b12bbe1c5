#!/bin/sh
# Makes the namespace and the secrets that the manifests ask for. No value is written to a file of this repository.
#
#   deploy/kuberay/secrets.sh KEYS_FILE     KEYS_FILE: made by `elasticrec serve key NAME --keys KEYS_FILE` (hashes, no keys)
#
# Secrets that are there stay as they are; KEYS_FILE replaces the one before.
set -eu

keys=${1:?usage: deploy/kuberay/secrets.sh KEYS_FILE}
test -s "$keys" || { echo "secrets: '$keys' is no key file; make one: elasticrec serve key NAME --keys $keys" >&2; exit 2; }
kubectl=${KUBECTL:-kubectl}

"$kubectl" get namespace elasticrec >/dev/null 2>&1 || "$kubectl" create namespace elasticrec
if ! "$kubectl" -n elasticrec get secret elasticrec-redis >/dev/null 2>&1; then
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' |
        "$kubectl" -n elasticrec create secret generic elasticrec-redis --from-file=password=/dev/stdin
fi
# At no time is there none: pods that start meanwhile mount it.
"$kubectl" -n elasticrec create secret generic elasticrec-keys --from-file=keys.json="$keys" --dry-run=client -o yaml |
    "$kubectl" -n elasticrec apply -f -
