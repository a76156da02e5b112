#!/bin/bash
# sfumato slurm --python /opt/venv/bin/python --nodes 2 --gpus 8 --time 1:00:00 -- sample runs/my-run 'it'\''s a fox' --seeds 1 2 --out 'my pictures'
#SBATCH --job-name=sample
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gres=gpu:8
#SBATCH --time=0-01:00:00
#SBATCH --no-requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

job=$SLURM_JOB_ID
run='my pictures'
mkdir -p "$run/logs" || exit 1
echo "$(date +%FT%T) on $SLURM_JOB_NODELIST; the log is $run/logs/slurm-$job.log"
exec >>"$run/logs/slurm-$job.log" 2>&1
echo "$(date +%FT%T) start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"

# sbatch hands on what the shell had that called it, but a place among ranks is not ours.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
python=/opt/venv/bin/python
export PATH="${python%/*}:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

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
code=0
srun --export=ALL --mpi=none --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    --cpu-bind=none --kill-on-bad-exit=0 --wait=0 \
    "$python" -m sfumato sample --gpus 8 runs/my-run 'it'\''s a fox' --seeds 1 2 --out 'my pictures' || code=$?
echo "$(date +%FT%T) exit code $code"

exit "$code"
