#!/bin/bash
# All measurements on a card in one command of less than ten minutes. Needs torch, Triton, matplotlib and
# NumPy, but no network: packages that are missing are installed from benchmarks/wheels (make card-wheels).
#
#   benchmarks/on_card.sh OUT COMMIT [PYTHON]
#
# Phases, each with a limit of its own; one that fails or runs out of time does not stop the next. OUT
# receives phases.csv, log.txt, parity.csv, kernels_gpu.csv, kernels_gpu_goals.md, plots, the demo's answers, rows and the
# timeline of a model's shape with random weights (shape_*), a trace of its first layers by torch's profiler
# (profile.json, profile.csv), the host's time of a step (host_steps.csv), and the tuning table. Put the table into
# kernels/triton/tuned/, rows and plots into benchmarks/. Without a card the phases before the rows run on the CPU,
# as a rehearsal.
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

# A server on a port, with a log and settings, until the phase ends; returns once it answers.
serve() {
    local port=$1 log=$2
    shift 2
    "$python" -m lockstep.launch.cli "$@" cluster.backend=local cluster.ranks_per_node=1 \
        frontend.host=127.0.0.1 frontend.port="$port" > "$log" 2>&1 &
    server=$!
    trap 'kill -TERM "$server" 2> /dev/null; wait "$server"; tail -n 5 "'"$log"'"' EXIT  # at the limit too
    trap 'exit 143' TERM
    for _ in $(seq 1000); do
        kill -0 "$server" 2> /dev/null || break
        "$python" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/health', timeout=2)" \
            2> /dev/null && return
        sleep 0.5
    done
    return 1
}

# The demo on a device: its answers are stored, or compared with stored ones.
demo() {
    local device=$1 port=$2
    shift 2
    serve "$port" "$out/demo_$device.txt" --recipe demo cluster.device="$device" || return 1
    "$python" -m lockstep.launch.cli canary --against "http://127.0.0.1:$port" "$@"
}

# A model's shape with random weights: decode, prompts of so many tokens, and the timeline of steps.
shape() {
    local recipe=$1 prompt=$2 url=http://127.0.0.1:8103 status=0
    shift 2
    serve 8103 "$out/shape.txt" --recipe "$recipe" "$@" model.weights=random frontend.admin_key=admin || return 1
    bench() { "$python" -m lockstep.launch.cli bench --url $url --rounds 1 --recipe "$recipe" "${@}"; }
    bench "$@" --input 64 --output 64 --concurrency 1,8,32,64,128,256 --out "$out/shape_decode" || status=1
    bench "$@" --input "$prompt" --output 8 --concurrency 1 --out "$out/shape_prompt" || status=1
    bench "$@" --input 64 --output 256 --concurrency 32 --requests 64 > /dev/null 2>&1 &
    local load=$!
    sleep 3
    ADMIN=admin "$python" -m lockstep.launch.cli timeline --url $url --admin-key-env ADMIN --steps 32 \
        --out "$out/shape_timeline.json" || status=1
    wait "$load" || status=1
    return $status
}
export -f versions serve demo shape
export out python

phase versions 30 bash -c versions
phase wheels 40 "$python" benchmarks/card_wheels.py --install "$home/site"
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')

# Kernels against the reference at the sizes of real models, one of each kind: parity.csv says which err.
phase parity 60 "$python" -m lockstep.kernels.bench.parity --out "$out" --seconds 45

# Tokens of a small model are those of the reference, captured or not, and no step waits for the device.
phase executor 70 "$python" -m pytest -q -n 4 -p no:cacheprovider tests/engine/rank/device/test_on_card.py

# Every bucket is captured and replayed before the demo serves.
phase demo-cpu 40 bash -c 'demo cpu 8101 --save "$out/demo_answers.json"'
phase "demo-$device" 50 bash -c "demo $device 8102 --answers \"\$out/demo_answers.json\""

# Qwen3-30B-A3B's shape on the card, beside the limits of its profile; the demo's shape in a rehearsal.
if [ "$device" = cuda ]; then
    card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr '[:upper:]' '[:lower:]')
    for hardware in gb200 b200 h200 h800 h100; do
        [[ "$card" != *$hardware* ]] || break
    done
    phase shape 130 bash -c "shape qwen3-30b-a3b-1xh100 8192 cluster.hardware=$hardware scheduler.max_running=256"
else
    phase shape 130 bash -c 'shape demo 256 cluster.device=cpu cluster.hardware=cpu'
fi
profiled=recipes/configs/qwen3-30b-a3b
[ "$device" = cuda ] || profiled=recipes/demo/model
phase profile 60 "$python" benchmarks/profile_steps.py --config "$profiled" --out "$out"

if [ "$device" = cuda ]; then
    # The 42 cases that matter most first, then all that time allows; rivals, FlashInfer among them, where
    # they are installed. A kernel that breaks its process ends the rows after it too; the next attempt
    # resumes behind it.
    rows=("$python" -m lockstep.kernels.bench --out "$out" --resume --commit "$commit")
    phase rows-first 70 "${rows[@]}" --seconds 60 --first
    for attempt in 1 2 3; do
        seconds=$(left 130)
        [ "$seconds" -gt 20 ] || break
        phase "rows-$attempt" $((seconds + 20)) "${rows[@]}" --seconds "$seconds" && break
    done
    phase plots 20 "$python" -m lockstep.kernels.bench.plot "$out/kernels_gpu.csv"
    phase tests 45 "$python" -m pytest -q -n 12 -p no:cacheprovider tests/kernels/triton
    seconds=$(left 15)
    phase tuning $((seconds + 10)) "$python" -m lockstep.kernels.bench.tune --seconds "$seconds" --commit "$commit"
    find kernels/triton/tuned -name '*.json' -newer "$home/begun" -exec cp -v {} "$out/" \;
fi
cat "$out/phases.csv"
rm -rf "$home"
