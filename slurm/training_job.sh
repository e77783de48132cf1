# shellcheck shell=bash
# What the batch scripts of this folder share. They read it from the folder in which they are
# submitted: SLURM runs a copy of the script itself, elsewhere.
#
# A job's history is a file beside its log: each attempt appends `attempt N`; the training appends
# `started IMAGES` when it has its state, and `ended CODE SENTENCE` when it ends; `died SENTENCE` is
# of a rank that a signal has ended. The exit codes are those of ganscale/errors.py.

readonly STOPPED=75 RANK_LOST=76
stop_asked='' step='' step_began=0 forwarder=''

say() { echo "$(date +'%F %T') job $SLURM_JOB_ID: $*"; }

fail() { # SENTENCE: a mistake
  say "error: $*"
  exit 2
}

# ---- The batch script's side: `train`, and `begin`, `run_step`, `conclude`, of which it consists.

train() { # CONFIG key=value...
  local tasks=${SLURM_NTASKS_PER_NODE:-1} cpus=${SLURM_CPUS_PER_TASK:-1}
  local ranks=$((SLURM_JOB_NUM_NODES * tasks)) gpus=${SLURM_GPUS_ON_NODE:-0}
  local options=() container=()
  ((${SLURM_NTASKS:-$ranks} == ranks)) || fail "$SLURM_NTASKS tasks are not $tasks on each of" \
    "$SLURM_JOB_NUM_NODES nodes: give sbatch --ntasks-per-node, not --ntasks"
  export GANSCALE_LAUNCHER=${GANSCALE_LAUNCHER:-srun} GANSCALE_CONTAINER=${GANSCALE_CONTAINER:-}
  case $GANSCALE_LAUNCHER in
    srun) options=(--ntasks-per-node="$tasks" --ntasks="$ranks" --cpus-per-task="$cpus") ;;
    accelerate) options=(--ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES"
      --cpus-per-task=$((tasks * cpus))) ;;
    *) fail "GANSCALE_LAUNCHER is srun or accelerate, not $GANSCALE_LAUNCHER" ;;
  esac
  ((gpus == 0 || gpus == tasks)) || fail "a rank has one GPU, but a node has $gpus GPUs and" \
    "$tasks tasks: give sbatch the same number as --gpus-per-node and --ntasks-per-node"
  # It would hide all GPUs but one from each task, and ranks choose theirs by number.
  [[ -z ${SLURM_GPUS_PER_TASK:-} ]] || fail "give sbatch --gpus-per-node, not --gpus-per-task"
  begin
  # Here a mistake is one sentence, and not one from each rank. 75 is a network that may be back.
  # In a container that srun opens, the ranks are the first to know.
  if ((attempt == 1)) && [[ -z ${GANSCALE_SRUN:-} ]]; then
    local checked=0
    read -ra container <<<"$GANSCALE_CONTAINER"
    "${container[@]}" ganscale config --check "$@" >/dev/null || checked=$?
    ((checked == 0 || checked == STOPPED)) || exit "$checked"
  fi
  choose_meeting_point
  export GANSCALE_RANKS=$ranks GANSCALE_RANKS_PER_NODE=$tasks
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus} NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  say "attempt $attempt, ranks $ranks, nodes $SLURM_JOB_NODELIST, meet at $MASTER_ADDR:$MASTER_PORT"
  # Ranks are numbered node by node and see all GPUs of their node. One that dies or fails is named
  # by the others, which then leave by themselves; --wait ends those that do not.
  run_step "${options[@]}" --distribution=block --cpu-bind=cores --mpi=none \
    --kill-on-bad-exit=0 --wait=30 bash -c 'source slurm/training_job.sh; as_task "$@"' task "$@"
}

begin() { # Opens the job's history and folder of logs.
  local log
  log=$(readlink "/proc/$$/fd/1")
  [[ -f $log ]] || log=$PWD/ganscale-$SLURM_JOB_ID.log # SLURM was given something like /dev/null
  export GANSCALE_LOGS=${log%.log}-ranks
  mkdir -p "$GANSCALE_LOGS"
  export GANSCALE_JOB_HISTORY_FILE=$GANSCALE_LOGS/history-$SLURM_JOB_ID
  touch "$GANSCALE_JOB_HISTORY_FILE" || true # a full disk may have room when the ranks are there
  attempt=$(($(grep -c '^attempt ' "$GANSCALE_JOB_HISTORY_FILE" || true) + 1))
  # Lines that a full disk has not taken count, too.
  ((attempt > ${SLURM_RESTART_COUNT:-0})) || attempt=$((SLURM_RESTART_COUNT + 1))
  echo "attempt $attempt" >>"$GANSCALE_JOB_HISTORY_FILE" || true
  PATH=$PWD/.venv/bin:$PATH # that of `make install`, where there is one
}

choose_meeting_point() { # Exports where ranks find rank 0.
  local first
  read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=$first
  if ((SLURM_JOB_NUM_NODES == 1)); then
    MASTER_ADDR=127.0.0.1
  elif ! getent hosts "$first" >/dev/null; then # no name server knows it, but SLURM does
    MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  fi
  # The job's own, and below those of outgoing connections.
  export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
  while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do # something listens there
    MASTER_PORT=$((10000 + (MASTER_PORT - 9999) % 20000))
  done
}

run_step() { # OPTION-OR-COMMAND...: srun with these, then `conclude`.
  local extra=() code=0
  [[ -z $stop_asked ]] || again "was asked to stop before it began"
  read -ra extra <<<"${GANSCALE_SRUN:-}"
  # USR1 would end an srun that is not ready to forward it.
  (trap '' USR1 && exec srun "${extra[@]}" "$@") &
  step_began=$SECONDS
  step=$!
  [[ -z $stop_asked ]] || ask_to_stop
  while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # a trapped signal ends it early
  done
  wait "$step" || code=$?
  trap '' USR1 TERM
  [[ -z $forwarder ]] || kill "$forwarder" 2>/dev/null || true
  conclude "$code"
}

ask_to_stop() { # The limit is near, or the job is preempted, cancelled or requeued.
  stop_asked=yes
  [[ -n $step && -z $forwarder ]] || return 0
  say "asks for a stop"
  {
    # USR1 ends a task whose shell has only just started. Later it is harmless, but not heard before
    # the training is ready to hear it, and so it is sent again and again.
    ((SECONDS >= step_began + 5)) || sleep $((step_began + 5 - SECONDS))
    while [[ -z $(verdict) ]] && kill -USR1 "$step" 2>/dev/null; do sleep 5; done
  } &
  forwarder=$!
}
trap ask_to_stop USR1 TERM # from here on

verdict() { # How this attempt ended: CODE SENTENCE, or nothing yet.
  awk '/^attempt /{line = ""} /^ended /{line = substr($0, 7)} END{print line}' \
    "$GANSCALE_JOB_HISTORY_FILE"
}

cause() { # The first rank of this attempt that a signal has ended, if any.
  awk '/^attempt /{line = ""} /^died / && !line{line = substr($0, 6)} END{print line}' \
    "$GANSCALE_JOB_HISTORY_FILE"
}

has_begun() { # Whether this attempt has come to train.
  awk '/^attempt /{begun = 0} /^started /{begun = 1} END{exit !begun}' "$GANSCALE_JOB_HISTORY_FILE"
}

conclude() { # SRUN'S-CODE: ends the job, or has it come again.
  local code sentence
  read -r code sentence <<<"$(verdict)" || true
  if [[ -z $code ]]; then
    code=$1 sentence=$(cause)
    [[ -n $sentence ]] || sentence="ended with code $1"
    # By a signal; or in the midst of training without a word, which a full disk did not take.
    if ((code >= 128)) || has_begun; then
      code=$RANK_LOST
      [[ -z $stop_asked ]] || code=$STOPPED sentence="was stopped"
    fi
  fi
  case $code in
    0) say "done" ;;
    "$STOPPED" | "$RANK_LOST") again "$sentence" "$code" ;;
    *) say "failed: $sentence" ;;
  esac
  exit "$code"
}

again() { # WHY [CODE]: back into the queue, unless that leads nowhere.
  local code=${2:-$STOPPED} job=$SLURM_JOB_ID most=${GANSCALE_MAX_ATTEMPTS:-5} idle status
  # The number of an array's last task is also that of the whole array.
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  idle=$(attempts_without_progress) || idle=$attempt # the file may be lost
  if ((idle >= most)); then
    say "$1; attempts without progress: $idle, which is the limit; submit it again to continue"
    exit "$code"
  fi
  for _ in {1..20}; do # SLURM's controller may be away for a while
    if status=$(scontrol --oneliner show job "$job"); then
      # Cancelled, out of time, requeued already; or running again, on another node than this one,
      # which SLURM has given up.
      if [[ $status != *" JobState=RUNNING "* ||
        $status != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
        say "$1; SLURM has ended this attempt"
        exit "$code"
      fi
      say "$1; goes back into the queue"
      if scontrol requeue "$job"; then
        exit "$code" # which nobody asks for any more
      fi
    fi
    sleep 10
  done
  say "$1; cannot be requeued: submit it again to continue"
  exit "$code"
}

attempts_without_progress() { # ... since the last that began further on than all before.
  awk 'BEGIN{best = -1} /^attempt /{n++} /^started /{if ($2 > best) {best = $2; last = n}}
    END{print (n > attempt ? n : attempt) - last}' attempt="$attempt" "$GANSCALE_JOB_HISTORY_FILE"
}

# ---- The side of each task that srun starts.

as_task() { # CONFIG key=value...: one rank, or the launcher of a node's ranks.
  local name log command container=() code=0 copy=''
  if ((SLURM_JOB_NUM_NODES > 1)); then
    choose_interface
  fi
  if [[ $GANSCALE_LAUNCHER == accelerate ]]; then
    name="the launcher on $SLURMD_NODENAME" log=$GANSCALE_LOGS/node-$SLURM_NODEID.log
    command=(accelerate launch --config_file "$(launch_file)" --num_machines "$SLURM_JOB_NUM_NODES"
      --num_processes "$GANSCALE_RANKS" --machine_rank "$SLURM_NODEID" --max_restarts 0
      --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" launch/train.py "$@")
  else
    name="rank $SLURM_PROCID on $SLURMD_NODENAME" log=$GANSCALE_LOGS/rank-$SLURM_PROCID.log
    command=(python launch/train.py "$@")
    if ((GANSCALE_RANKS > 1)); then
      export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
      export WORLD_SIZE=$GANSCALE_RANKS LOCAL_WORLD_SIZE=$GANSCALE_RANKS_PER_NODE
    fi
  fi
  read -ra container <<<"$GANSCALE_CONTAINER"
  # The first task writes into the job's log, the others into files of their own; what they say on
  # stderr stands in both. Signals are for the rank: these shells and `tee` outlive it.
  trap : USR1 TERM INT
  exec 3>&2
  if ((SLURM_PROCID > 0)); then
    # shellcheck disable=SC2094  # both append
    exec >>"$log" 3> >(trap '' USR1 TERM INT && exec tee -a "$log" >&2)
    copy=$!
  fi
  # USR1 would end Python before it can take it, and the launcher at any time.
  { (trap '' USR1 && exec "${container[@]}" "${command[@]}" 2>&3 3>&-) || code=$?; } 2>/dev/null
  if ((code >= 128)); then
    echo "$name was ended by signal $((code - 128))" >&3
    echo "died $name was ended by signal $((code - 128))" >>"$GANSCALE_JOB_HISTORY_FILE"
  fi
  exec 3>&-
  for _ in {1..20}; do # what the rank has left running may hold on to stderr, and is not waited for
    if [[ -z $copy ]] || ! kill -0 "$copy" 2>/dev/null; then
      break
    fi
    sleep 0.1
  done
  exit "$code"
}

launch_file() { # Of launch/, for this job.
  if ((${SLURM_GPUS_ON_NODE:-0} == 0)); then
    echo launch/cpu.yaml
  elif ((SLURM_JOB_NUM_NODES == 1)); then
    echo launch/one_machine.yaml
  else
    echo launch/many_machines.yaml
  fi
}

choose_interface() { # For gloo, which takes the address that this host's name stands for.
  local address name
  address=$(getent ahostsv4 "$(hostname)" | awk 'NR == 1 {print $1}') || true
  if [[ -z ${GLOO_SOCKET_IFNAME:-} && (-z $address || $address == 127.*) ]]; then
    name=$(ip -o -4 address show scope global | awk 'NR == 1 {print $2}') || true
    [[ -z $name ]] || export GLOO_SOCKET_IFNAME=$name
  fi
}
