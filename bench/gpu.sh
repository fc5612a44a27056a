#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in two halves of eight minutes and eight files at most:
# check: the kernels compiled in parallel, the GPU tests, the kernels under compute-sanitizer (where
# that is installed), the demo. time: the benchmarks. A short table comes last.
#
#   bash bench/gpu.sh [--out FOLDER] [check | time]     default: both, bench/results/<device>
#
# Uses the packages that PYTHON (default python3) has, and no network. Where the tree came without
# its .git, COMMIT names the commit in the result files.
set -uo pipefail
export TRITON_INTERPRET=0
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=
HALVES="check time"
while [ $# -gt 0 ]; do
    case $1 in
        --out) OUT=$2; shift 2 ;;
        check | time) HALVES=$1; shift ;;
        *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done
read -r NAME TARGET < <($PYTHON - <<'EOF'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu.sh needs an NVIDIA GPU that torch can see")
from bench.results import results_dir
print(results_dir(torch.device("cuda")).name, "sm_%d%d" % torch.cuda.get_device_capability())
EOF
) || exit 1
OUT=${OUT:-bench/results/$NAME}
mkdir -p "$OUT"
STATUS=0
SUMMARY=

# part TITLE SECONDS COMMAND...: runs it, goes on where it fails, remembers how it ended.
part() {
    local title=$1 limit=$2 begin=$SECONDS code=0
    shift 2
    echo "== $title"
    timeout --signal INT --kill-after 10 "$limit" "$@" || code=$?
    [ $code -eq 0 ] || STATUS=1
    SUMMARY+="$(printf '%-12s exit %-4s %4d s' "$title" $code $((SECONDS - begin)))"$'\n'
}

# Each of the same table in a file of its own; `python -m bench plot FILE` draws it.
timed() {
    local title=$1 limit=$2
    shift 2
    part "$title" "$limit" $PYTHON -m bench run --device cuda --no-chart --seconds 0.2 \
        --out "$OUT" "$@"
}

check() {
    part kernels 90 $PYTHON -m bench static --targets "$TARGET" --all --out "$OUT/static.json" \
        > "$OUT/tests.txt" 2>&1
    grep -e WRONG -e 'no nvcc' "$OUT/tests.txt"
    tail -n 2 "$OUT/tests.txt"
    local xdist=()
    $PYTHON -c 'import xdist' 2> /dev/null && xdist=(-n 14 --dist worksteal)
    part tests 150 $PYTHON -m pytest -q -m gpu "${xdist[@]}" \
        tests/test_triton.py tests/test_block.py tests/test_gpu.py tests/test_cuda.py \
        > "$OUT/tests.txt" 2>&1
    tail -n 40 "$OUT/tests.txt"
    part sanitizer 70 $PYTHON -m bench.sanitize
    part demo 40 make --silent demo VENV=none PYTHON="$PYTHON"
}

times() {
    local blocks=(--what block)
    timed all 80 --dtype float16 --peers reference triton cuda
    timed float32 35 --dtype float32 --peers reference triton "${blocks[@]}"
    timed bfloat16 30 --dtype bfloat16 --peers triton cuda "${blocks[@]}"
    timed batch-16 45 --dtype float16 --batch 16 --peers reference triton cuda "${blocks[@]}"
    timed batch-64 25 --dtype float16 --batch 64 --peers triton cuda "${blocks[@]}" \
        --modes forward --cases B1 L1 --maps 16x16 32x32 64x64
    # In folders of their own: their files would have the name of that of all.
    timed compiled 60 --dtype float16 --out "$OUT/compiled" --peers triton cuda compile \
        "${blocks[@]}" --cases B1 L1 YOLOv8s-P3
    timed autotune 60 --dtype float16 --out "$OUT/autotune" --peers triton cuda autotune \
        "${blocks[@]}" --modes forward --cases B1 YOLOv8s-P3
    part tiles 40 $PYTHON -m bench tiles > "$OUT/tiles.txt"
}

part library 100 make --silent setup VENV=none PYTHON="$PYTHON"
[[ $HALVES != *check* ]] || check
[[ $HALVES != *time* ]] || times
echo "== $NAME, $TARGET: $OUT"
printf '%s' "$SUMMARY"
exit $STATUS
