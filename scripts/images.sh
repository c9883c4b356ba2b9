#!/usr/bin/env bash
# Build both images, and let them build and serve the example: `make images`. Not part of the tests: it takes
# minutes and gigabytes. It needs docker, podman or buildah (ENGINE names another), and the example's base, which
# `make demo` downloads (BASE names another folder).
set -euo pipefail
cd "$(dirname "$0")/.."
engine=${ENGINE:-$(for each in docker podman buildah; do command -v $each >/dev/null && echo $each && break; done)}
[ -n "$engine" ] || { echo "images: no docker, podman or buildah; expected one of them, or ENGINE" >&2; exit 2; }
base=${BASE:-$HOME/.cache/loramux/models/SmolLM2-135M-Instruct}
[ -e "$base/config.json" ] || { echo "images: no checkpoint in $base; run \`make demo\` first, or set BASE" >&2; exit 2; }

work=$(mktemp -d)
containers=()
finish() {
  status=$?
  kill $(jobs -p) 2>/dev/null || true
  wait
  for each in "${containers[@]}"; do "$engine" rm -f "$each" >/dev/null 2>&1 || "$engine" rm "$each" >/dev/null 2>&1 || true; done
  [ $status = 0 ] || tail -n 20 "$work"/*.log
  rm -rf "$work"
}
trap finish EXIT

build() { # SERVICE [ARGUMENT...]
  local service=$1
  shift
  echo "building loramux-$service"
  if [ "$engine" = buildah ]; then set -- bud "$@"; else set -- build "$@"; fi
  # BUILD_FLAGS: a proxy, a cache of wheels, --build-arg PIP_EXTRA_INDEX_URL=... for torch without CUDA
  "$engine" "$@" ${BUILD_FLAGS:-} -f "deploy/$service.Dockerfile" -t "loramux-$service:images" . >"$work/$service-image.log" 2>&1
  "$engine" images | grep "loramux-$service" | head -1
}

run() { # SERVICE VARIABLE=VALUE... -- COMMAND...
  local image=loramux-$1:images flags=() container
  shift
  while [ "$1" != -- ]; do flags+=(--env "$1") && shift; done
  shift
  flags+=(--network host -v "$work/data:/data" --env LORAMUX_STORE=file:///data/store --env LORAMUX_LOCAL_ROOTS=/data)
  if [ "$engine" = buildah ]; then
    container=$(buildah from "$image")
    containers+=("$container")
    exec buildah run "${flags[@]}" "$container" -- "$@"
  fi
  exec "$engine" run --rm "${flags[@]}" "$image" "$@"
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

build builder
build inference

mkdir -p "$work/data/store"
cp -r examples "$work/data/examples"
cp -r "$base" "$work/data/base"
sed 's#~/.cache/loramux/models/SmolLM2-135M-Instruct#/data/base#; s#repo: \(\./\)\?adapters/#repo: /data/examples/adapters/#' \
  examples/deployment.yaml >"$work/data/deployment.yaml"
chmod -R a+rwX "$work"

builder=127.0.0.1:$(free_port) grpc=127.0.0.1:$(free_port) http=127.0.0.1:$(free_port)
run builder LORAMUX_GRPC="$builder" LORAMUX_WORK_DIR=/tmp/work -- python -m builder_service >"$work/builder.log" 2>&1 &
(run builder -- loramux health "$builder" --wait 60)
(run builder -- loramux build /data/deployment.yaml --builder "$builder") | tail -n 1
run inference LORAMUX_DEPLOYMENT=smollm2-demo LORAMUX_GRPC="$grpc" LORAMUX_HTTP="$http" -- \
  python -m inference_service >"$work/inference.log" 2>&1 &
for _ in $(seq 180); do curl -sf "http://$http/health" >"$work/health.log" && break; sleep 1; done
answer=$(curl -sSf "http://$http/v1/completions" -H 'content-type: application/json' \
  -d '{"model": "pirate", "prompt": "The sea", "max_tokens": 8}')
echo "$answer" | python3 -c 'import json, sys; print("pirate:", json.load(sys.stdin)["choices"][0]["text"].strip())'
