"""The fixed text of the batch script; the variables in it are set by ``slurm.render``, above it.

A run that is told to go is told by a file: a signal to a job step reaches every process of it, workers of data loaders
included. The launcher on the first node looks for the file (the script runs there too), and its ranks tell the others.

Rollout servers have to outlive the trainer's last step, so they do not listen to SIGTERM, which Slurm sends to all
steps of a job that it preempts or cancels; SIGINT ends them.
"""

BODY = r"""
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address() {{  # of a host, as Slurm itself reaches it
    scontrol --oneliner show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}}
restarts=${{SLURM_RESTART_COUNT:-0}}
start="$files/job-$SLURM_JOB_ID.$restarts"
stop="$start.stop"

asked=
ask() {{  # the ranks finish their step if there is time, else they keep what they have; then they save
    asked=${{asked:-$1}}
    : > "$stop"
}}
trap 'ask USR1' USR1  # the time of the job is over soon, or it is preempted
trap 'ask TERM' TERM  # it is cancelled

if [[ $command != eval && -e $run/config.yaml ]] && {{ (( restarts > 0 )) || [[ $behind ]]; }}; then
    resume=(--resume)  # which begins a run anew that ended before its first checkpoint
fi

settings=(
    "launch.nodes=$trainer_nodes"
    launch.rendezvous=static
    "launch.endpoint=$(address "${{hosts[0]}}"):$((first_port + SLURM_JOB_ID % num_ports))"
)
{servers}
srun ${{srun_options[@]+"${{srun_options[@]}}"}} --nodes="$trainer_nodes" --ntasks="$trainer_nodes" \
    --ntasks-per-node=1 --relative=0 --export=ALL --kill-on-bad-exit=0 --wait=300 \
    "${{python[@]}}" -m perl_megatron launch torchrun --job "$command" ${{resume[@]+"${{resume[@]}}"}} \
    --logs "$start" --stop-file "$stop" "$config" "${{settings[@]}}" &
trainer=$!

while kill -0 "$trainer" 2> /dev/null; do
    wait "$trainer"  # which a signal to this script interrupts
done
wait "$trainer"
status=$?
rm -f -- "$stop"
job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
# A job that is preempted with a grace time gets no signal of its own: its steps get SIGTERM.
[[ $job == *" PreemptTime="[0-9]* ]] && asked=USR1
if [[ $asked == USR1 && $status == "$stopped_status" && $requeue && $job != *" JobState=CANCELLED "* ]]; then
    echo "queued again, to resume"
    scontrol requeue "$SLURM_JOB_ID"
fi
{servers_end}exit "$status"
"""

SERVERS = r"""
addresses=
for host in "${hosts[@]:$trainer_nodes}"; do
    for (( number = 0; number < servers_per_node; number++ )); do
        addresses+="${addresses:+,}http://$(address "$host"):$((server_port + number))"
    done
done
settings+=(rollout.engine=server "rollout.servers=$addresses" "rollout.api_key_file=$api_key_file")
serve_node='# of each rollout node: one server for every so many of its GPUs
servers_per_node=$1 gpus_per_server=$2 port=$3
shift 3
IFS=, read -r -a gpus <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((servers_per_node * gpus_per_server - 1)))}"
for (( number = 0; number < servers_per_node; number++ )); do
    if (( gpus_per_server > 0 )); then
        mine=("${gpus[@]:$((number * gpus_per_server)):$gpus_per_server}")
        export CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${mine[*]}")
    fi
    "$@" --port $((port + number)) &
done
trap : TERM INT  # this shell outlives its servers, which Slurm tells too: with a shell that ends first, they are killed
until wait; do :; done'
srun ${srun_options[@]+"${srun_options[@]}"} --nodes="$rollout_nodes" --ntasks="$rollout_nodes" --ntasks-per-node=1 \
    --relative="$trainer_nodes" --export=ALL --kill-on-bad-exit=0 --job-name=servers --output="$start.servers-%n.log" \
    bash -c "$serve_node" serve_node "$servers_per_node" "$gpus_per_server" "$server_port" \
    "${python[@]}" -m perl_megatron serve "$config" --host 0.0.0.0 --ignore-sigterm \
    "rollout.api_key_file=$api_key_file" &
servers=$!
"""

SERVERS_END = r"""told=
for (( second = 0; second < 20; second++ )); do
    kill -0 "$servers" 2> /dev/null || break
    if [[ ! $told ]]; then  # which Slurm refuses now and then, for a step that only begins or beside one that ends
        steps=$(squeue --steps --jobs="$SLURM_JOB_ID" --noheader --format='%i %j')
        step=$(sed -n 's/^ *\([^ ]*\) *servers *$/\1/p' <<< "$steps")
        [[ $step ]] && scancel --signal=INT "$step" 2> /dev/null && told=1
    fi
    sleep 1
done
kill "$servers" 2> /dev/null  # srun then kills what is left
wait "$servers"
"""
