#!/bin/bash
# sfumato slurm --python /opt/venv/bin/python my-run.toml --gpus 2 --gres none --output slurm-%x-%j.txt
#SBATCH --job-name=my-run
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.txt

job=$SLURM_JOB_ID
run=runs/my-run
mkdir -p "$run/logs" || exit 1
echo "$(date +%FT%T) start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"

# sbatch hands on what the shell had that called it, but a place among ranks is not ours.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
python=/opt/venv/bin/python
export PATH="${python%/*}:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# One task a node, which starts and watches this node's ranks. Each finds out itself who is lost.
ended=
trap 'ended=yes' TERM
code=0
srun --export=ALL --mpi=none --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    --cpu-bind=none --kill-on-bad-exit=0 --wait=0 \
    "$python" -m sfumato train --gpus 2 my-run.toml || code=$?
echo "$(date +%FT%T) exit code $code"

# 75: asked to stop, saved, can go on. All else is an end, and so is scancel.
[ "$code" -eq 75 ] && [ -z "$ended" ] || exit "$code"
at=$(find "$run/checkpoints" -maxdepth 1 -name 'step-*[0-9]' 2>/dev/null | sort -V | tail -n 1)
at=${at##*/} ends=$run/logs/slurm-$job.ends
echo "${at:-step 0}" >>"$ends"
if [ "${SLURM_RESTART_COUNT:-0}" -ge 100 ]; then
    echo "started again 100 times: not put back into the queue"
elif [ "$(grep -cxF "${at:-step 0}" "$ends")" -ge 3 ]; then
    echo "3 starts have ended at ${at:-step 0}: not put back into the queue"
else
    echo "put back into the queue"
    scontrol requeue "$job"
fi
exit "$code"
