"""The work of the commands `learn` and `plan`, `repro`, `doctor`, of jobs on Slurm, and of the chat in the terminal."""
