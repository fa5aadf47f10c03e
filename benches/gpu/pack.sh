#!/usr/bin/env bash
# Puts what run.sh needs into a folder that can be carried to a machine with a GPU and nothing else:
#
#     benches/gpu/pack.sh FOLDER        after the three builds of README.md; SHARED: ../shared, WHEELS=0 leaves them out
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
shared=${SHARED:-$root/../shared}
to=$1
mkdir -p "$to"
newest() { find "$root/target/release/deps" -maxdepth 1 -type f -executable -name "$1-*" -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2; }
strip -o "$to/litgpt" "$root/target/release/litgpt"
strip -o "$to/gpu" "$(newest gpu)"
strip -o "$to/tests" "$(newest main)"
for binary in litgpt gpu tests; do
  grep -aq cublasGemmEx "$to/$binary" || { echo "$binary: built without --features cuda; build it again" >&2; exit 1; }
done
cp "$root/benches/gpu/run.sh" "$to/"
cp -r "$root/data" "$to/"
cp "$shared/data/alpaca_999.json" "$to/data/"
rm -rf "$to/bench" "$to/golden"
cp -r "$shared/bench" "$to/bench"
mkdir -p "$to/golden"
cp -r "$shared/golden/models" "$shared/golden/lora" "$to/golden/"
chmod -R u+w "$to"
[ "${WHEELS:-1}" = 0 ] || (cd "$to" && bash bench/wheels.sh whl)
tar -C "$to" -c . | gzip -1 | wc -c | awk '{printf "%.1f MB compressed\n", $1 / 1e6}'
