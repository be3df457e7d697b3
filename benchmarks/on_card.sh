#!/bin/bash
# All measurements on a card in one command of less than ten minutes. Needs torch, Triton, matplotlib
# and pytest-xdist, but no network. Tunes tile sizes, measures every row, draws the plots, and runs
# the tests of kernels and of captured steps in the time that is left.
#
#   benchmarks/on_card.sh OUT COMMIT [PYTHON]
#
# OUT receives eight files: the tuning table, kernels_gpu.csv, kernels_gpu_goals.md, four plots and
# log.txt. Put the table into kernels/triton/tuned/ and the others except the log into benchmarks/.
set -u
out=$1 commit=$2 python=${3:-python3}
deadline=$(($(date +%s) + 560))
left() { echo $((deadline - $(date +%s) - $1)); }  # seconds left, less $1

mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
home=$(mktemp -d)
touch "$home/begun"
ln -s "$PWD" "$home/lockstep"  # the checkout is the package, under any folder name
export PYTHONPATH=$home:$PWD/tests TRITON_CACHE_DIR=$home/triton PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
"$python" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__, torch.version.cuda)'

timeout -k 5 170 "$python" -m lockstep.kernels.bench.tune --seconds 130 --commit "$commit"
find kernels/triton/tuned -name '*.json' -newer "$home/begun" -exec cp -v {} "$out/" \;

# A kernel that breaks its process ends the rows after it too; the next attempt resumes behind it.
for attempt in 1 2 3; do
    seconds=$(left 75)
    [ "$seconds" -gt 20 ] || break
    timeout -k 5 $((seconds + 20)) "$python" -m lockstep.kernels.bench --out "$out" --resume \
        --seconds "$seconds" --commit "$commit" && break
    echo "attempt $attempt ended early"
done
timeout -k 5 40 "$python" -m lockstep.kernels.bench.plot "$out/kernels_gpu.csv"

seconds=$(left 0)
if [ "$seconds" -gt 20 ]; then
    timeout -k 5 "$seconds" "$python" -m pytest -q -n 12 -p no:cacheprovider \
        tests/engine/rank/device/test_on_card.py tests/kernels/triton | tail -n 40
fi
rm -rf "$home"
