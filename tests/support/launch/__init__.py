"""Launched commands, clusters of dummy roles, hosts made of namespaces, Slurm."""
