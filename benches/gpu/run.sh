#!/usr/bin/env bash
# The GPU tests, then ours and the peers on the same inputs, in one call; see README.md for the variables. Runs from the
# folder that pack.sh made, and appends JSON lines to $OUT/results.jsonl.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
OUT=${OUT:-$PWD/out}
MODELS=${MODELS:-stablelm-base-alpha-3b}
SETTINGS=${SETTINGS:-bf16-true bnb.nf4 bnb.nf4-dq}
TOOLS=${TOOLS-litgpt}
SEQ_LENS=${SEQ_LENS:-0}
WARMUP=${WARMUP:-16}
ITERATIONS=${ITERATIONS:-320}
EXTRA=${EXTRA:-}
CPU=${CPU:-}
LIMIT=${LIMIT:-560}
TESTS=${TESTS:-1}
OPS=${OPS:-1}
PYTHON=${PYTHON:-python3}
DATA=${DATA:-$here/data/alpaca_999.json}
WORK=${WORK:-/dev/shm/bench}
mkdir -p "$OUT" "$WORK"
log=$OUT/run.log

# cuBLAS and the CUDA runtime, from Python's packages where the system has none.
for folder in $($PYTHON -c 'import glob, site; [print(f) for p in site.getsitepackages() for f in glob.glob(p + "/nvidia/**/lib", recursive=True)]' 2>/dev/null); do
  LD_LIBRARY_PATH=$folder:${LD_LIBRARY_PATH:-}
done
export LD_LIBRARY_PATH
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,memory.used,driver_version --format=csv,noheader

# Each test in a process of its own: after a fault nothing more runs in one.
if [ "$TESTS" = 1 ]; then
  for name in $("$here/tests" --list device:: 2>/dev/null | sed -n 's/: test$//p'); do
    left=$((LIMIT / 2 - SECONDS))
    [ $left -lt 5 ] && { echo "no time left: $name"; continue; }
    (cd "$here" && LITGPT_GOLDEN=$here/golden LITGPT_TEST_DEVICE=cuda LITGPT_TF32=0 LITGPT_CUDA_SYNC=${LITGPT_CUDA_SYNC:-0} \
      RUST_BACKTRACE=0 timeout $left ./tests --exact "$name" --test-threads=1 --nocapture >"$OUT/$name.log" 2>&1)
    echo "$name: exit $?"
    grep -E -A1 'panicked|cases that failed' "$OUT/$name.log" | cut -c1-400
  done
fi

# Each op by itself, so that what is slow has a name.
if [ "$OPS" = 1 ]; then
  timeout 100 "$here/gpu" --ops >"$OUT/ops.jsonl" 2>>"$log"
  echo "ops: exit $?, $(wc -l <"$OUT/ops.jsonl") lines"
  # 4-bit products of the same sizes: all decoded first, by pieces of several sizes, and none.
  for mb in 64 32 16; do
    LITGPT_FUSED_NF4=0 LITGPT_DECODED_MB=$mb timeout 40 "$here/gpu" --ops "nf4" >"$OUT/ops-decoded-$mb.jsonl" 2>>"$log"
    echo "4-bit products, $mb MB decoded at a time: exit $?"
  done
  LITGPT_FUSED_NF4=4096 timeout 40 "$here/gpu" --ops "nf4" >"$OUT/ops-fused.jsonl" 2>>"$log"
  echo "4-bit products, decoded where they are multiplied: exit $?"
  for tokens in 0 4096; do
    LITGPT_FUSED_LORA=$tokens timeout 40 "$here/gpu" --ops "adapters" >"$OUT/ops-adapters-$tokens.jsonl" 2>>"$log"
    echo "adapters by kernels of our own up to $tokens tokens: exit $?"
  done
fi

for model in $MODELS; do
  [ -e "$WORK/$model/config.json" ] ||
    $PYTHON "$here/bench/make_inputs.py" --model "$model" --out "$WORK" --data "$DATA" || exit 1
  for seq_len in $SEQ_LENS; do for setting in $SETTINGS; do
    [ $((LIMIT - SECONDS)) -lt 20 ] && { echo "no time left: ours $model $setting $seq_len"; continue; }
    began=$SECONDS
    # shellcheck disable=SC2086
    timeout $((LIMIT - SECONDS)) "$here/gpu" --checkpoint "$WORK/$model" --data "$DATA" --setting "$setting" \
      --seq-len "$seq_len" --warmup "$WARMUP" --iterations "$ITERATIONS" --json "$OUT/results.jsonl" $EXTRA ${CPU:+--cpu} >>"$log" 2>&1
    code=$?
    echo "ours $model $setting $seq_len: exit $code after $((SECONDS - began)) s"
    [ $code = 0 ] || tail -3 "$log" | cut -c1-400
  done; done
  if [ -n "$TOOLS" ]; then
    OUT=$OUT/peers MODELS=$model TOOLS=$TOOLS SETTINGS=$SETTINGS SEQ_LENS=$SEQ_LENS WARMUP=$WARMUP ITERATIONS=$ITERATIONS \
      EXTRA=$EXTRA DATA=$DATA WORK=$WORK WHEELS=$here/whl LIMIT=$((LIMIT - SECONDS)) PYTHON=$PYTHON KEEP=1 \
      bash "$here/bench/run_peers.sh"
    cat "$OUT/peers/peers.jsonl" >>"$OUT/results.jsonl" 2>/dev/null
    rm -f "$OUT/peers/peers.jsonl"
  fi
  rm -rf "${WORK:?}/$model"
done
[ -e "$OUT/results.jsonl" ] && $PYTHON "$here/bench/table.py" "$OUT/results.jsonl"
exit 0
