#!/bin/bash
# All measurements on a card in one command of less than ten minutes. Needs torch, Triton, matplotlib and
# NumPy, but no network: packages that are missing are installed from benchmarks/wheels (make card-wheels).
#
#   benchmarks/on_card.sh OUT COMMIT [PYTHON]
#
# Phases, each with a limit of its own; one that fails or runs out of time does not stop the next. OUT
# receives phases.csv, log.txt, kernels_gpu.csv, kernels_gpu_goals.md, plots, the demo's answers and the tuning
# table. Put the table into kernels/triton/tuned/, rows and plots into benchmarks/. Without a card the phases
# before the rows run on the CPU, as a rehearsal.
set -u
out=$1 commit=$2 python=${3:-python3}
deadline=$(($(date +%s) + 560))
left() { echo $((deadline - $(date +%s) - $1)); }  # seconds left, less $1

mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
home=$(mktemp -d)
touch "$home/begun"
ln -s "$PWD" "$home/lockstep"  # the checkout is the package, under any folder name
export PYTHONPATH=$home:$PWD/tests:$home/site TRITON_CACHE_DIR=$home/triton PYTHONUNBUFFERED=1
echo phase,status,seconds > "$out/phases.csv"

# phase NAME LIMIT COMMAND...: status 124 says that the limit came first.
phase() {
    local name=$1 limit=$2 begun status
    shift 2
    [ "$limit" -lt "$(left 0)" ] || limit=$(left 0)
    if [ "$limit" -lt 5 ]; then
        echo "$name,out of time,0" >> "$out/phases.csv"
        return 1
    fi
    echo "== $name: at most $limit s"
    begun=$(date +%s)
    timeout -k 5 "$limit" "$@"
    status=$?
    echo "$name,$status,$(($(date +%s) - begun))" >> "$out/phases.csv"
    return $status
}

versions() {
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
    "$python" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__, torch.version.cuda)'
}

# The demo on a device: its answers are stored, or compared with stored ones.
demo() {
    local device=$1 port=$2 status
    shift 2
    "$python" -m lockstep.launch.cli --recipe demo cluster.backend=local cluster.ranks_per_node=1 \
        cluster.device="$device" frontend.port="$port" > "$out/demo_$device.txt" 2>&1 &
    server=$!
    trap 'kill -TERM "$server" 2> /dev/null; wait "$server"' EXIT  # also when the limit comes first
    trap 'exit 143' TERM
    for _ in $(seq 1000); do
        kill -0 "$server" 2> /dev/null || break
        "$python" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/health', timeout=2)" \
            2> /dev/null && break
        sleep 0.5
    done
    "$python" -m lockstep.launch.cli canary --against "http://127.0.0.1:$port" "$@"
    status=$?
    tail -n 5 "$out/demo_$device.txt"
    return $status
}
export -f versions demo
export out python

phase versions 30 bash -c versions
phase wheels 40 "$python" benchmarks/card_wheels.py --install "$home/site"
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')

# Tokens of a small model are those of the reference, captured or not, and no step waits for the device.
phase executor 90 "$python" -m pytest -q -n 4 -p no:cacheprovider tests/engine/rank/device/test_on_card.py

# Every bucket is captured and replayed before the demo serves.
phase demo-cpu 60 bash -c 'demo cpu 8101 --save "$out/demo_answers.json"'
phase "demo-$device" 90 bash -c "demo $device 8102 --answers \"\$out/demo_answers.json\""

if [ "$device" = cuda ]; then
    # Attention over latents and FP8 products first, then all that time allows; rivals, FlashInfer among
    # them, where they are installed. A kernel that breaks its process ends the rows after it too; the next
    # attempt resumes behind it.
    rows=("$python" -m lockstep.kernels.bench --out "$out" --resume --commit "$commit")
    phase rows-latents 60 "${rows[@]}" --seconds 40 --only mla_attend
    phase rows-linear-fp8 40 "${rows[@]}" --seconds 25 --only linear_fp8
    for attempt in 1 2 3; do
        seconds=$(left 190)
        [ "$seconds" -gt 20 ] || break
        phase "rows-$attempt" $((seconds + 20)) "${rows[@]}" --seconds "$seconds" && break
    done
    phase plots 30 "$python" -m lockstep.kernels.bench.plot "$out/kernels_gpu.csv"
    phase tests 60 "$python" -m pytest -q -n 12 -p no:cacheprovider tests/kernels/triton
    seconds=$(left 15)
    phase tuning $((seconds + 10)) "$python" -m lockstep.kernels.bench.tune --seconds "$seconds" --commit "$commit"
    find kernels/triton/tuned -name '*.json' -newer "$home/begun" -exec cp -v {} "$out/" \;
fi
cat "$out/phases.csv"
rm -rf "$home"
