"""Slurm: cluster profiles and job submission. Runs on login nodes, and imports no torch."""
