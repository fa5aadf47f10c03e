#!/usr/bin/env bash
# Runs every fuzz target for SECONDS (600), two at a time, and prints a line for each: executions, coverage, findings.
# Usage: tests/fuzz/run.sh [SECONDS] [TARGET ...]
#
# The flags are what cargo-fuzz gives the compiler on its nightly channel, less the address sanitizer, which stable
# Rust lacks: of `unsafe` code the targets reach little but the mapping of files.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-600}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(config weights pickle gguf adapter tokenizer rows recipe template)

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-../../target/fuzz}
host=$(rustc -vV | sed -n 's/^host: //p')
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares" cargo build --release --target "$host" --bins
programs=$CARGO_TARGET_DIR/$host/release
work=$CARGO_TARGET_DIR/work
SEEDS=$work/seeds "$programs/seeds" -runs=0 -verbosity=0

# One target: its corpus and findings stay in its folder.
fuzz() {
    local folder=$work/$1 code=0
    mkdir -p "$folder/corpus" "$folder/findings"
    RAYON_NUM_THREADS=1 "$programs/$1" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 \
        -print_final_stats=1 -verbosity=1 -artifact_prefix="$folder/findings/" "$folder/corpus" "$work/seeds/$1" \
        >"$folder/log" 2>&1 || code=$?
    local executions coverage findings
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$folder/log")
    coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$folder/log" | tail -1)
    findings=$(find "$folder/findings" -type f | wc -l)
    echo "$1: exit $code, ${executions:-0} executions in $seconds s, coverage ${coverage:-0}, $findings findings"
    return "$code"
}
export -f fuzz
export seconds programs work
printf '%s\n' "${targets[@]}" | xargs -P 2 -I{} bash -c 'fuzz {}'
