#!/usr/bin/env bash
# A run on a Slurm cluster: Ray on all nodes of the job, genray on its first, and everything ended with it.
#
#   sbatch --nodes=2 --gpus-per-node=1 --time=24:00:00 cluster/slurm.sh \
#       --config configs/cifar10_resnet18_generalist.yaml device=cuda
#
# Submit in the folder of pyproject.toml, which all nodes must see; arguments are those of `python -m genray.train`.
# GENRAY_VENV is the environment that holds genray (default: .venv in this folder), GENRAY_STORAGE the folder of the
# runs (default: runs), on a file system that outlives the job. Submit the same line again after a time limit or a lost
# node: --resume, which is always given, goes on from the newest checkpoint.
#SBATCH --job-name=genray
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=8
#SBATCH --output=genray-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?run it by sbatch}"
source "${GENRAY_VENV:-.venv}/bin/activate"

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(head -n 1 <<< "$nodes")
port=$((20000 + SLURM_JOB_ID % 10000))

# A password of this job alone, in the environment of its processes and nowhere else.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

# Starts Ray on every node, runs the command on the first, stops Ray; one task a node. --exclusive, above, because
# stopping Ray stops every Ray of yours on a node.
srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "${SLURM_CPUS_PER_TASK:-8}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --include-dashboard=false \
    -- python -m genray.train --address "$head:$port" --storage "${GENRAY_STORAGE:-runs}" --resume "$@"
