# ------------------------------------------------ from here on the script is equal for all recipes

set -u
set -m  # gives every step a process group of its own, which signals to this script's do not reach

job=$SLURM_JOB_ID
folder=${folder:-$SLURM_SUBMIT_DIR/}lockstep-$job  # logs, on a file system that all nodes share
scratch=$scratch/lockstep-$job  # Ray's sockets, on each node's own disk; deleted at the end
unset RAY_ADDRESS

say() { echo "$(date +%T)  $*"; }
fail() {
    echo "error: $1" >&2
    exit 1
}

mkdir -p "$folder" || fail "the job's folder $folder cannot be made"
[ "$SLURM_JOB_NUM_NODES" = "$num_nodes" ] ||
    fail "the job has $SLURM_JOB_NUM_NODES nodes, the script was made for $num_nodes"
[ -n "$image" ] || command -v "${bin}launch" > /dev/null ||
    fail "${bin}launch is not on $(hostname); see launch slurm --bin"
config=$(scontrol show config)
kill_wait=$(awk '$1 == "KillWait" { print $3 }' <<< "$config")
awk "BEGIN { exit !($drain_deadline + 15 > ${kill_wait:-0}) }" &&
    say "a plain scancel leaves ${kill_wait:-?} s (KillWait) of the $drain_deadline s to drain;" \
        "scancel --batch --signal=TERM $job leaves all"

# step NODES NUMBER ...: runs a task on each node. Steps share the nodes' cores, memory and GPUs.
# Run it in the background, where SIGUSR1 ends it; see launch/slurm/step.py.
bind=()
[[ $config != *task/affinity* ]] || bind=(--cpu-bind=none)
container=()
[ -z "$image" ] || container=("--container-image=$image" "--container-name=lockstep-$job"
    "--container-mounts=$folder:$folder,$scratch:$scratch${mounts:+,$mounts}")
step() {
    exec srun "--nodelist=$1" "--nodes=$2" "--ntasks=$2" --ntasks-per-node=1 \
        --overlap --mem=0 --no-kill --kill-on-bad-exit=0 "${bind[@]}" "${container[@]}" "${@:3}"
}
obey=("${bin}python3" -P -m lockstep.launch.slurm.step)

# Waits for a background step whatever signals come meanwhile; returns its status.
status_of() {
    while kill -0 "$1" 2> /dev/null; do wait "$1"; done
    wait "$1"
}

head=$SLURMD_NODENAME
workers=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "$head" | paste -sd,)
if [ -n "$interface" ]; then
    address=$(ip -o -4 address show dev "$interface" | awk '{ sub("/.*", "", $4); print $4; exit }')
else
    name=$(scontrol --oneliner show node "$head" | grep -o "NodeAddr=[^ ]*")
    address=$(getent ahostsv4 "${name#NodeAddr=}" | awk '{ print $1; exit }')
fi
case $address in
    "") fail "no address of $head found${interface:+ on its interface $interface}" ;;
    127.*) fail "$head has the address $address, which no other node reaches; see launch slurm --interface" ;;
esac

# Ports: ten by the job's number, or the next ten if one of them is in use.
listens() { (: < "/dev/tcp/$address/$1" || : < "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }
first=$((20000 + job % 1000 * 10))
while listens $first || listens $((first + 1)) || listens $((first + 2)) ||
    listens $((first + 3)); do
    first=$((20000 + (first + 10) % 10000))
done
port=${port:-$((first + 1))}
case ${host:-0.0.0.0} in
    0.0.0.0 | ::) served=$address ;;
    *) served=$host ;;
esac
ray=("${obey[@]}" --patience 20 --scratch "$scratch" --logs "$folder"
    "${bin}ray" start --block "--temp-dir=$scratch" --object-store-memory=100000000
    --disable-usage-stats "--num-gpus=$gpus"
    --min-worker-port=0 --max-worker-port=0 "--dashboard-agent-listen-port=$((first + 2))")
# Port of Ray's client server, which Ray starts if grpc is installed; otherwise it refuses the option.
client=()
"${bin}python3" -c "import grpc" 2> /dev/null && client=("--ray-client-server-port=$((first + 3))")
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE RAY_AUTH_TOKEN

# On SIGTERM (by Slurm before the time limit, or scancel) launch drains and ends, and then the job.
told=
serving=
drain() {
    told=yes
    say "told to stop"
    [ -z "$serving" ] || kill -USR1 "$serving"
}
trap drain TERM INT

# Ends Ray whenever the script ends, and keeps its exit code.
ray_head=
ray_workers=
finish() {
    code=$?
    rm -f "$folder/endpoint"
    for ray_step in $ray_workers $ray_head; do
        kill -USR1 "$ray_step" 2> /dev/null ||
            say "Ray had ended before launch did; see $folder/ray-*.log"
    done
    for ray_step in $ray_workers $ray_head; do
        status_of "$ray_step" > /dev/null 2>&1
    done
    say "job $job ends with $code"
    exit $code
}
trap finish EXIT

# Runs a command on the first node; drain tells it to end.
on_head() {
    step "$head" 1 "${obey[@]}" "$@" &
    serving=$!
    status_of $serving
}

say "job $job on $SLURM_JOB_NODELIST; logs in $folder"
step "$head" 1 --output="$folder/ray-%N.log" "${ray[@]}" \
    --head "--node-ip-address=$address" "--port=$first" --include-dashboard=false \
    "${client[@]}" "--num-cpus=${cpus[0]}" &
ray_head=$!
for _ in $(seq 1200); do
    if listens "$first" || [ -n "$told" ]; then break; fi
    kill -0 $ray_head 2> /dev/null || fail "Ray did not start on $head; see $folder/ray-$head.log"
    sleep 0.1
done
[ -z "$told" ] || exit 0
listens "$first" ||
    fail "Ray does not listen on $address:$first after two minutes; see $folder/ray-$head.log"
if [ -n "$workers" ]; then
    step "$workers" $((num_nodes - 1)) --output="$folder/ray-%N.log" "${ray[@]}" \
        "--address=$address:$first" "--num-cpus=${cpus[1]}" &
    ray_workers=$!
fi
say "Ray on $head ($address:$first)${workers:+ and $workers}"

recipe+=("cluster.address=$address:$first" "cluster.log_dir=$folder")
recipe+=("frontend.host=${host:-$address}" "frontend.port=$port")
if [ -n "$check" ]; then
    on_head "${bin}launch" check "${recipe[@]}"
    found=$?
    [ $found = 0 ] || [ $found = 3 ] || [ -n "$told" ] || exit $found  # 3: warnings only
fi
[ -z "$told" ] || exit 0
say "serving at http://$served:$port/v1 as soon as it is ready"
echo "http://$served:$port/v1" > "$folder/endpoint"
on_head "${bin}launch" "${recipe[@]}"
