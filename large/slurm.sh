#!/bin/bash
# The NTK of fc on 5 million images, on 32 hosts of 8 GPUs under Slurm. In the folder of train_cifar.py, where .venv is:
#     DATA=/shared/cifar5m SCRATCH=/shared sbatch large/slurm.sh
# All hosts must see the store. Submitted again, or requeued when a host failed, the run goes on from the store; --nodes may
# differ. We have not run this on a cluster: large/test_large.py checks these flags, and runs two processes as srun does.
#SBATCH --nodes=32 --ntasks-per-node=1 --gpus-per-node=8 --exclusive --requeue
source .venv/bin/activate
srun python -u train_cifar.py --dataset cifar5m --data $DATA --n_train 5000000 --n_test 10000 \
    --kernel fc --kind ntk --ridge 0.1 --tile 8192 --store $SCRATCH/cifar5m-fc
