# shellcheck shell=bash
# Functions for the batch scripts of this folder. They source it from the folder in which they are
# submitted, because SLURM runs a copy of the script from elsewhere.
#
# A job's history is a file beside its log. Each attempt appends `attempt N`; the training appends
# `started IMAGES` once its state is loaded, `bad NODE` for a node that the next attempt had better
# avoid, and `ended CODE MESSAGE` at its end. `died MESSAGE` is appended for a rank that a signal has
# killed, and `exited CODE` by the first task. The exit codes are those of ganscale/errors.py.

[[ -n ${SLURM_JOB_ID:-} ]] || {
  echo "error: this is a batch script: submit it with sbatch" >&2
  exit 2
}
readonly STOPPED=75 RANK_LOST=76
stop_asked='' step='' step_began=0 forwarder=''

say() { echo "$(date +'%F %T') job $SLURM_JOB_ID: $*"; }

fail() { # MESSAGE: for a mistake of the user
  say "error: $*"
  exit 2
}

# ---- In the batch script: `train`, which calls `begin`, `run_step` and `conclude`.

train() { # CONFIG key=value...
  local tasks=${SLURM_NTASKS_PER_NODE:-1} cpus=${SLURM_CPUS_PER_TASK:-1}
  local ranks=$((SLURM_JOB_NUM_NODES * tasks)) gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
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
  gpus=${gpus##*:} # without their type; with sbatch --exclusive, a node may have more
  ((gpus == 0 || gpus == tasks)) || fail "a rank uses one GPU, but a node has $gpus GPUs and" \
    "$tasks tasks: give sbatch the same number for --gpus-per-node and --ntasks-per-node"
  # It would hide all GPUs but one from each task, but ranks choose theirs by number.
  [[ -z ${SLURM_GPUS_PER_TASK:-} ]] || fail "give sbatch --gpus-per-node, not --gpus-per-task"
  begin
  # Here a mistake is reported once, and not by each rank. 75 is a network failure that may pass.
  # Only the ranks can check the settings in a container that srun opens.
  if ((attempt == 1)) && [[ -z ${GANSCALE_SRUN:-} ]]; then
    local checked=0
    read -ra container <<<"$GANSCALE_CONTAINER"
    "${container[@]}" ganscale config --check "$@" >/dev/null || checked=$?
    ((checked == 0 || checked == STOPPED)) || exit "$checked"
  fi
  choose_rendezvous
  export GANSCALE_RANKS=$ranks GANSCALE_RANKS_PER_NODE=$tasks
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus} NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  say "attempt $attempt: $ranks ranks on $SLURM_JOB_NODELIST, at $MASTER_ADDR:$MASTER_PORT"
  # Ranks are numbered node by node and socket by socket, as GPUs are, and see all GPUs of their node.
  # If one dies or fails, the others name it and exit by themselves; --wait kills those that do not.
  run_step "${options[@]}" --distribution=block:block --cpu-bind=cores --mpi=none \
    --kill-on-bad-exit=0 --wait=30 bash -c 'source slurm/training_job.sh; as_task "$@"' task "$@"
}

begin() { # Opens the job's history and log folder.
  local log
  log=$(readlink "/proc/$$/fd/1")
  [[ -f $log ]] || log=$PWD/ganscale-$SLURM_JOB_ID.log # if the log is /dev/null, say
  export GANSCALE_LOGS=${log%.log}-ranks
  mkdir -p "$GANSCALE_LOGS"
  # Clusters that share a disk count their jobs separately, and may begin again at 1.
  export GANSCALE_JOB_HISTORY_FILE=$GANSCALE_LOGS/history-$SLURM_JOB_ID-${SLURM_CLUSTER_NAME:-slurm}
  if ((${SLURM_RESTART_COUNT:-0} == 0)) && [[ -s $GANSCALE_JOB_HISTORY_FILE ]]; then
    mv --backup=numbered "$GANSCALE_JOB_HISTORY_FILE" "$GANSCALE_JOB_HISTORY_FILE.old" || true
  fi
  touch "$GANSCALE_JOB_HISTORY_FILE" || true # a full disk may have room again once the ranks start
  attempt=$(($(grep -c '^attempt ' "$GANSCALE_JOB_HISTORY_FILE" || true) + 1))
  # Also counts attempts whose line a full disk has lost.
  ((attempt > ${SLURM_RESTART_COUNT:-0})) || attempt=$((SLURM_RESTART_COUNT + 1))
  echo "attempt $attempt" >>"$GANSCALE_JOB_HISTORY_FILE" || true
  export PATH=$PWD/.venv/bin:$PATH # from `make install`, if it was used
  export SLURM_EXPORT_ENV=ALL      # the ranks need this script's variables, also after --export=NONE
}

choose_rendezvous() { # Exports the address and port of rank 0.
  local first
  GANSCALE_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
  first=${GANSCALE_HOSTS%% *}
  export GANSCALE_HOSTS MASTER_ADDR=$first
  if ((SLURM_JOB_NUM_NODES == 1)); then
    MASTER_ADDR=127.0.0.1
  elif ! getent hosts "$first" >/dev/null; then # unknown to the name servers, but not to SLURM
    MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  fi
  # Depends on the job, and is below the ports of outgoing connections.
  export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
  while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do # the port is in use
    MASTER_PORT=$((10000 + (MASTER_PORT - 9999) % 20000))
  done
}

run_step() { # ARGUMENT...: srun with these, then `conclude`.
  local extra=() code=0
  [[ -z $stop_asked ]] || again "stopped before it began"
  read -ra extra <<<"${GANSCALE_SRUN:-}"
  # USR1 would kill an srun that is not yet ready to forward it.
  (trap '' USR1 && exec srun "${extra[@]}" "$@") &
  step_began=$SECONDS
  step=$!
  [[ -z $stop_asked ]] || ask_to_stop
  while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # a trapped signal interrupts it
  done
  wait "$step" || code=$?
  trap '' USR1 USR2 TERM HUP XCPU
  [[ -z $forwarder ]] || kill "$forwarder" 2>/dev/null || true
  conclude "$code"
}

ask_to_stop() { # The time limit is near, or the job is preempted, cancelled or requeued.
  stop_asked=yes
  [[ -n $step && -z $forwarder ]] || return 0
  say "asking the ranks to stop"
  {
    # USR1 kills a task whose shell has only just started. After that it is harmless, but ignored
    # until the training handles it, so it is sent repeatedly.
    ((SECONDS >= step_began + 5)) || sleep $((step_began + 5 - SECONDS))
    while [[ -z $(outcome) ]] && kill -USR1 "$step" 2>/dev/null; do sleep 5; done
  } &
  forwarder=$!
}
trap ask_to_stop USR1 USR2 TERM HUP XCPU # from here on

outcome() { # How this attempt ended: CODE MESSAGE, or nothing yet.
  awk '/^attempt /{line = ""} /^ended /{line = substr($0, 7)} END{print line}' \
    "$GANSCALE_JOB_HISTORY_FILE"
}

first_death() { # The first rank of this attempt that a signal has killed, if any.
  awk '/^attempt /{line = ""} /^died / && !line{line = substr($0, 6)} END{print line}' \
    "$GANSCALE_JOB_HISTORY_FILE"
}

bad_nodes() { # The nodes that this attempt has found to be bad, one a line.
  awk '/^attempt /{split("", bad)} /^bad /{bad[$2]} END{for (node in bad) print node}' \
    "$GANSCALE_JOB_HISTORY_FILE"
}

has_started() { # Whether this attempt has begun to train.
  awk '/^attempt /{ok = 0} /^started /{ok = 1} END{exit !ok}' "$GANSCALE_JOB_HISTORY_FILE"
}

has_exited() { # Whether the first task of this attempt has ended by itself.
  awk '/^attempt /{ok = 0} /^exited /{ok = 1} END{exit !ok}' "$GANSCALE_JOB_HISTORY_FILE"
}

conclude() { # SRUN'S-CODE: ends the job, or requeues it.
  local code message
  read -r code message <<<"$(outcome)" || true
  if [[ -z $code ]]; then
    code=$1 message=$(first_death)
    [[ -n $message ]] || message="ended with code $1"
    # As with `srun --test-only`, or an srun that is a script of the cluster.
    ((code > 0)) || has_exited ||
      code=1 message="srun has ended with code 0, but no task has reported its end"
    # Killed by a signal; or while training, and a full disk has lost the message.
    if ((code >= 128)) || has_started; then
      code=$RANK_LOST
      [[ -z $stop_asked ]] || code=$STOPPED message="was stopped"
    fi
  fi
  case $code in
    0) say "done" ;;
    "$STOPPED" | "$RANK_LOST") again "$message" "$code" ;;
    *) say "failed: $message" ;;
  esac
  exit "$code"
}

again() { # WHY [CODE]: puts the job back into the queue, unless it makes no progress.
  local code=${2:-$STOPPED} job=$SLURM_JOB_ID most=${GANSCALE_MAX_ATTEMPTS:-5} idle status
  # The job id of an array's last task is also that of the whole array.
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  idle=$(attempts_without_progress) || idle=$attempt # if the file is lost
  if ((idle >= most)); then
    say "$1; attempts without progress: $idle, which is the limit; submit it again to continue"
    exit "$code"
  fi
  for _ in {1..20}; do # SLURM's controller may be unreachable for a while
    if status=$(scontrol --oneliner show job "$job"); then
      # Cancelled, timed out, requeued already; or running again on another node, because SLURM has
      # given up this one.
      if [[ $status != *" JobState=RUNNING "* ||
        $status != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
        say "$1; SLURM has ended this attempt"
        exit "$code"
      fi
      say "$1; goes back into the queue"
      if scontrol requeue "$job"; then
        avoid_bad_nodes "$job" "$status" # SLURM starts the job again once this script has ended
        exit "$code"                     # SLURM ignores it
      fi
    fi
    sleep 10
  done
  say "$1; cannot be requeued: submit it again to continue"
  exit "$code"
}

avoid_bad_nodes() { # JOB ITS-STATUS: keeps bad nodes out of the next attempt, if others are left.
  local excluded left
  excluded=$(bad_nodes | paste -sd,)
  [[ -n $excluded ]] || return 0
  [[ $2 =~ \ ExcNodeList=([^ ]*) && ${BASH_REMATCH[1]} != "(null)" ]] &&
    excluded=${BASH_REMATCH[1]},$excluded
  left=$(sinfo --noheader --responding --Node --partition="$SLURM_JOB_PARTITION" --format=%N \
    --states=idle,allocated,mixed,completing | sort -u |
    grep -cvxFf <(scontrol show hostnames "$excluded")) || true
  if [[ $2 == *" ReqNodeList=(null) "* ]] && ((left >= SLURM_JOB_NUM_NODES)) &&
    scontrol update JobId="$1" ExcNodeList="$excluded"; then
    say "the next attempt avoids $excluded"
  else
    say "$excluded had better be avoided, but the job needs it: submit it with other nodes"
  fi
}

attempts_without_progress() { # Since the last one that started at more images than any before.
  awk 'BEGIN{best = -1} /^attempt /{n++} /^started /{if ($2 > best) {best = $2; last = n}}
    END{print (n > attempt ? n : attempt) - last}' attempt="$attempt" "$GANSCALE_JOB_HISTORY_FILE"
}

# ---- In each task that srun starts.

run_noted() { # COMMAND...: as the only task.
  local code=0
  "$@" || code=$?
  note_exit "$code"
}

note_exit() { # CODE: srun's own 0 does not prove that it has run anything.
  ((SLURM_PROCID > 0)) || echo "exited $1" >>"$GANSCALE_JOB_HISTORY_FILE"
  exit "$1"
}

as_task() { # CONFIG key=value...: runs one rank, or the launcher of a node's ranks.
  local name log command container=() code=0 copy=''
  if ((SLURM_JOB_NUM_NODES > 1)); then
    choose_interface
  fi
  raise_limits
  if [[ $GANSCALE_LAUNCHER == accelerate ]]; then
    name="the launcher on $SLURMD_NODENAME" log=$GANSCALE_LOGS/node-$SLURM_NODEID.log
    command=(accelerate launch --config_file "$(launch_file)" --num_machines "$SLURM_JOB_NUM_NODES"
      --num_processes "$GANSCALE_RANKS" --machine_rank "$SLURM_NODEID" --max_restarts 0
      --rdzv_conf timeout=120
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
  # The first task writes into the job's log, each other one into a separate file; stderr goes to
  # both. Signals are meant for the rank: these shells and `tee` outlive it.
  trap : USR1 USR2 TERM HUP XCPU INT
  exec 3>&2
  if ((SLURM_PROCID > 0)); then
    # shellcheck disable=SC2094  # both append
    exec >>"$log" 3> >(trap '' USR1 USR2 TERM HUP XCPU INT && exec tee -a "$log" >&2)
    copy=$!
  fi
  pause_dcgm --pause
  # These would kill Python before it handles the signals, and the launcher at any time.
  { (trap '' USR1 USR2 && exec "${container[@]}" "${command[@]}" 2>&3 3>&-) || code=$?; } 2>/dev/null
  pause_dcgm --resume
  if ((code >= 128)); then
    echo "$name was killed by signal $((code - 128))" >&3
    echo "died $name was killed by signal $((code - 128))" >>"$GANSCALE_JOB_HISTORY_FILE"
  fi
  exec 3>&-
  for _ in {1..20}; do # not for ever: processes that the rank has left behind may keep stderr open
    if [[ -z $copy ]] || ! kill -0 "$copy" 2>/dev/null; then
      break
    fi
    sleep 0.1
  done
  note_exit "$code"
}

launch_file() { # The file in launch/ for this job.
  if ((${SLURM_GPUS_ON_NODE:-0} == 0)); then
    echo launch/cpu.yaml
  elif ((SLURM_JOB_NUM_NODES == 1)); then
    echo launch/one_machine.yaml
  else
    echo launch/many_machines.yaml
  fi
}

choose_interface() { # For gloo, which by default uses the address of this host's name.
  local address name
  address=$(getent ahostsv4 "$(hostname)" | awk 'NR == 1 {print $1}') || true
  if [[ -z ${GLOO_SOCKET_IFNAME:-} && (-z $address || $address == 127.*) ]]; then
    name=$(ip -o -4 address show scope global | awk 'NR == 1 {print $2}') || true
    [[ -z $name ]] || export GLOO_SOCKET_IFNAME=$name
  fi
}

raise_limits() { # As far as this node permits. SLURM passes on those of the shell that ran sbatch.
  local name here=$SLURMD_NODENAME
  for name in n l; do
    ulimit -S -$name "$(ulimit -H -$name)" 2>/dev/null || true
  done
  ((SLURM_LOCALID == 0)) || return 0
  if [[ $(ulimit -n) != unlimited ]] && (($(ulimit -n) < 4096)); then
    say "warning: on $here, a process may open only $(ulimit -n) files (ulimit -n); 4096 are safe" >&2
  fi
  if [[ -d /sys/class/infiniband && $(ulimit -l) != unlimited ]]; then
    say "warning: on $here, only $(ulimit -l) kB of memory can be locked (ulimit -l); InfiniBand and" \
      "EFA need more: set LimitMEMLOCK=infinity for slurmd" >&2
  fi
}

pause_dcgm() { # --pause or --resume: its profiling, which competes with PyTorch's for the counters.
  if [[ -n ${GANSCALE_PAUSE_DCGM:-} ]] && ((SLURM_LOCALID == 0)); then
    dcgmi profile "$1" >/dev/null || say "warning: dcgmi profile $1 failed on $SLURMD_NODENAME" >&2
  fi
}
