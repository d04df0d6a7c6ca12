"""Ray: the cluster, its nodes, and the workers of a job."""
