#!/usr/bin/env bash
#SBATCH --job-name=grurcn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#
# A Ray cluster for one command, on the nodes of one Slurm job:
#
#     sbatch cluster/deploy/slurm.sh python -m jobs.train gru-rcn --shards /data/ucf101 --storage /data/runs --workers 16
#     sbatch --nodes 4 --gpus-per-node 4 cluster/deploy/slurm.sh python -m jobs.train ...      options override those above
#
# Submit from the clone, in the environment with the packages, both on a file system that all nodes see. 120 s before the job's
# time is over the command gets SIGTERM and saves; the job is put in the queue again, and the same command goes on there.
# `scancel --batch --signal=TERM JOB` saves and ends it. The job's status is the command's.
set -euo pipefail

fail() { echo "error: $1" >&2; exit "${2:-1}"; }
[ $# -gt 0 ] || fail "no command; usage: sbatch [options] $0 COMMAND ..." 2
: "${SLURM_JOB_ID:?is not set; start this script by sbatch}" "${SLURM_JOB_NODELIST:?is not set; start this script by sbatch}"
cd "${SLURM_SUBMIT_DIR:-.}"
[ -f cluster/deploy/environment.sh ] || fail "$PWD: no cluster/deploy/environment.sh; submit from the clone" 2
. cluster/deploy/environment.sh

# The token is made for this job, in a folder that all nodes see and no other user. Ray is told its path: neither a list of
# processes nor a command line shows it.
folder=${GRURCN_SLURM_DIR:-$PWD/runs/slurm}/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export RAY_AUTH_TOKEN_PATH=$folder/token
(umask 077 && mkdir -p "$folder" && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$folder/token")
# Ray's sockets and logs: local to each node, of this job alone, and short, as a socket's path has 107 characters at most.
temporary=/tmp/ray-$SLURM_JOB_ID

# A step of the job on one node, beside its other steps; srun does not inherit the number of cores.
on=(srun --nodes=1 --ntasks=1 --overlap --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" -w)
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]:-}
[ -n "$head" ] || fail "scontrol names no node of $SLURM_JOB_NODELIST"
# The head's address on the interface that NCCL and gloo use, and three of its free ports, other ones in each job: jobs may share
# a node. All further ports are free ones that Ray finds by itself.
read -r head_address gcs dashboard client < <("${on[@]}" "$head" python -c '
import os, socket, psutil
found = psutil.net_if_addrs().get(os.environ.get("GLOO_SOCKET_IFNAME", ""), [])
address = next((each.address for each in found if each.family == socket.AF_INET), None)
address = address or socket.gethostbyname(socket.gethostname())
held = [socket.create_server((address, 0)) for _ in range(3)]
print(address, *(each.getsockname()[1] for each in held))') || fail "no step could be started on $head"
export RAY_ADDRESS=$head_address:$gcs

steps=()
start_ray() { # NODE OPTION ...: until the step is ended
    "${on[@]}" "$1" bash -c '. cluster/deploy/environment.sh; exec ray start "$@"' ray-start "${@:2}" --block \
        --temp-dir="$temporary" --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --dashboard-agent-listen-port=0 --disable-usage-stats \
        > "$folder/$1.log" 2>&1 &
    steps+=($!)
}
clean() {
    trap '' TERM INT
    kill "${steps[@]}" 2> /dev/null || true
    wait || true
    srun --ntasks="${#nodes[@]}" --ntasks-per-node=1 --overlap rm -rf "$temporary" || true
    rm -f "$folder/token" # the logs stay
}
trap clean EXIT

# A signal goes on to the command, which saves. It ends bash's `wait`, and not the command.
command='' signalled='' interrupted=''
forward() {
    signalled=1 interrupted=1
    [ -z "$command" ] || kill -TERM "$command" 2> /dev/null || true
}
trap forward TERM INT

seconds=${GRURCN_SLURM_WAIT_SECONDS:-300}
wait_until() { # WHAT COMMAND ...: tries the command until it succeeds
    until "${@:2}"; do
        [ -z "$signalled" ] || exit 143
        for number in "${!steps[@]}"; do
            node=${nodes[$number]}
            kill -0 "${steps[$number]}" 2> /dev/null || fail "ray start ended on $node: $(tail -n 3 "$folder/$node.log")"
        done
        [ $SECONDS -lt "$seconds" ] || fail "waited $seconds s for $1; see $folder/*.log"
        sleep 1
    done
}
answers() { (: > "/dev/tcp/$head_address/$gcs") 2> /dev/null; }
joined() {
    timeout 60 python - "${#nodes[@]}" 2> "$folder/joined.log" << 'PYTHON'
import sys, ray

ray.init(log_to_driver=False)
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))
PYTHON
}
start_ray "$head" --head --node-ip-address="$head_address" --port="$gcs" --dashboard-host=127.0.0.1 \
    --dashboard-port="$dashboard" --ray-client-server-port="$client"
wait_until "Ray on $head ($RAY_ADDRESS)" answers
for node in "${nodes[@]:1}"; do start_ray "$node" --address="$RAY_ADDRESS"; done
# The command begins when all nodes are there: it takes the GPUs that it finds.
wait_until "all of ${nodes[*]} to join Ray at $RAY_ADDRESS" joined

"$@" &
command=$!
until interrupted='' && { wait "$command" && status=0 || status=$?; } && [ -z "$interrupted" ]; do :; done
left=$((${SLURM_JOB_END_TIME:-0} - $(date +%s)))
if [ "$status" = 143 ] && [ "$signalled" ] && [ $left -ge 0 ] && [ $left -le 180 ]; then
    scontrol requeue "$SLURM_JOB_ID" || true # the time is over, not the work
fi
exit "$status"
