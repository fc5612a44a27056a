#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in under eight minutes and no more than eight files: the
# kernels compiled in parallel, the GPU tests, the benchmarks. A short table comes last.
#
#   bash bench/gpu.sh [--out FOLDER]     default: bench/results/<device>
#
# Uses the packages that PYTHON (default python3) has, and no network. Where the tree came without
# its .git, COMMIT names the commit in the result files.
set -uo pipefail
export TRITON_INTERPRET=0
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=
while [ $# -gt 0 ]; do
    case $1 in
        --out) OUT=$2; shift 2 ;;
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

part library 40 make --silent setup VENV=none PYTHON="$PYTHON"
part kernels 60 $PYTHON -m bench static --targets "$TARGET" --all --out "$OUT/static.json" \
    > "$OUT/tests.txt" 2>&1
grep WRONG "$OUT/tests.txt"
tail -n 2 "$OUT/tests.txt"
XDIST=()
$PYTHON -c 'import xdist' 2> /dev/null && XDIST=(-n 14 --dist worksteal)
part tests 115 $PYTHON -m pytest -q -m gpu "${XDIST[@]}" \
    tests/test_triton.py tests/test_block.py tests/test_gpu.py > "$OUT/tests.txt" 2>&1
tail -n 40 "$OUT/tests.txt"
part latency 40 $PYTHON -m bench operators --device cuda --quick --out "$OUT" --no-chart \
    --cases T1 B1 --dtype float32 --batch 1 --providers triton
part blocks 60 $PYTHON -m bench run --device cuda --quick --out "$OUT" \
    --cases B1 YOLOv8s-P3 --dtype float16 --batch 1 --providers reference triton compile
part blocks-64 40 $PYTHON -m bench run --device cuda --quick --out "$OUT" --no-chart \
    --cases B1 --dtype float16 --batch 64 --providers reference triton compile
# One map, in a folder of its own: the file would have the name of that of the blocks.
part autotune 60 $PYTHON -m bench run --device cuda --quick --out "$OUT/autotune" --no-chart \
    --cases YOLOv8s-P3 --dtype float16 --batch 1 --providers triton autotune
part operators 64 $PYTHON -m bench operators --device cuda --quick --out "$OUT" --no-chart \
    --cases B1 --dtype float16 --batch 16
echo "== $NAME, $TARGET: $OUT"
printf '%s' "$SUMMARY"
exit $STATUS
