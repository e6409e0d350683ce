#!/bin/bash
# What `condenser launch` submits; @@{...} is filled in. Edit a copy and give it with --template.
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{nodes}
#SBATCH --ntasks-per-node=@{tasks}
#SBATCH --cpus-per-task=@{cpus}
#SBATCH --time=@{time}
#SBATCH --chdir=@{workdir}
#SBATCH --output=@{folder}/slurm-@{log}.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@@@{notice}
@{directives}

@{setup}
folder=@{folder}
runs=(@{runs}) # a folder for each task of an array
vain=$folder/in-vain-$SLURM_JOB_ID
export PYTHONPATH=$folder/code${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1  # else the working folder would come first, with code that may have been edited since
export OMP_NUM_THREADS=@{cpus}

newest() { ls "${runs[${SLURM_ARRAY_TASK_ID:-0}]}"/checkpoints/last-step=*.ckpt 2>/dev/null | sort -V | tail -n 1; }
before=$(newest)

# One process per GPU. SIGUSR1 comes @{notice} seconds before the time limit: all save and end with code 76. When a process
# is lost, the others have a minute to say so and end. --export=ALL: what is exported above reaches them whatever the job's
# own --export says.
srun --export=ALL --cpus-per-task=@{cpus} --kill-on-bad-exit=0 --wait=60 @{srun} \
  @{python} -m condenser fit --config "$folder"/settings@{suffix}.yaml
status=$?

# Put the job back, when all its processes have ended, if its time was up, or if a process or a node was lost (74, or killed
# by a signal), but not after @{retries} starts in a row without a new checkpoint; not if it was refused (1) or asked to end
# (75, or 143 at its very start). It goes on in the same run folder and W&B run.
if [ "$(newest)" = "$before" ]; then echo $status >>"$vain"; else rm -f "$vain"; fi
lost=$((status == 74 || (status > 128 && status != 143)))
again=$((lost && $(cat "$vain" 2>/dev/null | wc -l) < @{retries}))
if [ $status = 76 ] || [ $again = 1 ]; then
  task=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  echo "job ${task:-$SLURM_JOB_ID} ended with code $status and goes back into the queue"
  scontrol requeue "${task:-$SLURM_JOB_ID}"
fi
exit $status
