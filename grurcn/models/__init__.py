"""Networks, as pure PyTorch: clips -> maps -> states -> scores, or words. Needs torch and nothing else."""
