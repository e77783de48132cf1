#!/bin/bash
# Builds the image of the Dockerfile without a Docker daemon, and trains in it as a user who is not root:
#   tools/check_image.sh
# Needs root, and Debian's buildah and debootstrap. The base is a fresh Debian instead of the one with
# CUDA, as docs/cluster.md has it for machines without GPUs. Everything is made in a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
  echo "image-check: skipped, since $1"
  [[ -z ${GANSCALE_REQUIRE_ALL_TESTS:-} ]] || exit 1
  exit 0
}
(($(id -u) == 0)) || skip "building without a daemon needs root"
for tool in buildah debootstrap; do
  command -v "$tool" >/dev/null || skip "$tool is not installed"
done

work=$(mktemp -d) step=start
finish() {
  local code=$?
  ((code == 0)) || { tail -n 50 "$work/log" && echo "image-check: failed in the step: $step"; }
  rm -rf "$work"
}
trap finish EXIT

echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$work/policy.json"
buildah() { # Needs no overlay file system and no user namespaces.
  command buildah --root "$work/store" --runroot "$work/run" --storage-driver vfs "$@"
}
trusted=(--signature-policy "$work/policy.json")
chroot=(--isolation chroot --network host)

pip_setting() { # NAME: its value on this machine, if any
  { python3 -m pip config list || true; } | sed -n "s/^[^=]*\.$1='\(.*\)'$/\1/p" | tail -n 1
}
wheels=$(pip_setting find-links) # perhaps a folder, in which torch may come without CUDA
[[ -d $wheels ]] || wheels=$work

base() { # Makes the base image: Debian, with this machine's certificates and settings of pip.
  local root=$work/root container index
  debootstrap --variant=minbase --include=ca-certificates bookworm "$root"
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  {
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\nfind-links = %s\n' "$wheels"
    index=$(pip_setting index-url)
    [[ -z $index ]] || echo "index-url = $index"
  } >"$root/etc/pip.conf"
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$root" / >/dev/null
  buildah commit --quiet "${trusted[@]}" --rm "$container" localhost/base >/dev/null
  rm -rf "$root"
}

build() {
  buildah build "${chroot[@]}" --layers=false --pull-never "${trusted[@]}" \
    --volume "$wheels:$wheels:ro" --build-arg BASE=localhost/base --tag localhost/ganscale .
}

try() { # Writes shards and trains on them in folders of a user whom the image does not know.
  local container user=12345 mounted=()
  install -d -o $user "$work/data" "$work/runs"
  mounted=(--volume "$work/data:/ganscale/data" --volume "$work/runs:/ganscale/runs")
  container=$(buildah from --pull-never "${trusted[@]}" localhost/ganscale)
  inside() { buildah run "${chroot[@]}" --user $user "${mounted[@]}" "$container" -- "$@"; }
  inside ganscale shards write bundled:mnist data/mnist
  inside ganscale train configs/demo.yaml training.total_images=640 log.wandb=offline
  [[ $(stat -c %u "$work"/runs/demo/checkpoints/images-000000640) == "$user" ]]
}

for step in base build try; do
  started=$SECONDS
  $step >"$work/log" 2>&1
  echo "image-check: $step took $((SECONDS - started)) s"
done
