"""Jobs on a Slurm cluster, through submitit."""
