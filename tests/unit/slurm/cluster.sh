#!/bin/bash
# sfumato slurm --python /opt/venv/bin/python my-run.toml optimizer.lr=1e-5 --nodes 4 --gpus 8 --time 8:00:00 --partition big --account art --qos high --mem 900G --gres gpu:a100 --constraint '[rack1|rack2]' --cpus-per-gpu 12 --job-name 'a "b'\'' c\d' --setup 'module load cuda/12.4; module load gcc' --sbatch exclusive --sbatch reservation=mine --grace 600 --restarts 20 --fruitless 2
#SBATCH --job-name="a \"b' c\\d"
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gres=gpu:a100:8
#SBATCH --mem=900G
#SBATCH --partition=big
#SBATCH --account=art
#SBATCH --qos=high
#SBATCH --constraint=[rack1|rack2]
#SBATCH --time=0-08:00:00
#SBATCH --exclusive
#SBATCH --reservation=mine
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

job=$SLURM_JOB_ID
run=runs/my-run
mkdir -p "$run/logs" || exit 1
echo "$(date +%FT%T) on $SLURM_JOB_NODELIST; the log is $run/logs/slurm-$job.log"
exec >>"$run/logs/slurm-$job.log" 2>&1
echo "$(date +%FT%T) start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"

# sbatch hands on what the shell had that called it, but a place among ranks is not ours.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
module load cuda/12.4; module load gcc
set +e +u +o pipefail
python=/opt/venv/bin/python
export PATH="${python%/*}:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-12}

# Where the ranks meet: this node, by the name that Slurm itself uses, on a port that is free here.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n "s/.*NodeAddr=\([^ ]*\).*/\1/p")
MASTER_ADDR=${MASTER_ADDR:-$first}
for try in {0..99}; do
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + try) % 10000))
    timeout 5 bash -c ": >/dev/tcp/$MASTER_ADDR/$MASTER_PORT" 2>/dev/null || break
done
export MASTER_ADDR MASTER_PORT

# One task a node, which starts and watches this node's ranks. Each finds out itself who is lost.
ended=
trap 'ended=yes' TERM
code=0
srun --export=ALL --mpi=none --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    --cpu-bind=none --kill-on-bad-exit=0 --wait=0 \
    "$python" -m sfumato train --gpus 8 my-run.toml optimizer.lr=1e-5 || code=$?
echo "$(date +%FT%T) exit code $code"

# 75: asked to stop, saved, can go on. All else is an end, and so is scancel.
[ "$code" -eq 75 ] && [ -z "$ended" ] || exit "$code"
at=$(find "$run/checkpoints" -maxdepth 1 -name 'step-*[0-9]' 2>/dev/null | sort -V | tail -n 1)
at=${at##*/} ends=$run/logs/slurm-$job.ends
echo "${at:-step 0}" >>"$ends"
if [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ]; then
    echo "started again 20 times: not put back into the queue"
elif [ "$(grep -cxF "${at:-step 0}" "$ends")" -ge 2 ]; then
    echo "2 starts have ended at ${at:-step 0}: not put back into the queue"
else
    echo "put back into the queue"
    scontrol requeue "$job"
fi
exit "$code"
