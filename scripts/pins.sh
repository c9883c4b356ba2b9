#!/usr/bin/env bash
# Write the digest that a registry has for the tag of each base image into Dockerfiles: `make pins`. Dependabot
# raises a digest that is there, and adds none.
set -euo pipefail
for file in "$@"; do
  for base in $(sed -nE 's/^FROM ([^ @]+:[^ @]+).*/\1/p' "$file" | sort -u); do
    digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$base")
    [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || { echo "pins: $base: expected a digest, found '$digest'" >&2; exit 1; }
    sed -i.old -E "s#^FROM ${base//./\\.}(@sha256:[0-9a-f]+)?( |\$)#FROM $base@$digest\\2#" "$file" && rm "$file.old"
    echo "$file: $base@$digest"
  done
done
