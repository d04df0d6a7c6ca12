"""clip batch -> maps -> states -> scores -> loss: GRU-RCN (Ballas et al., ICLR 2016). Needs torch and nothing else."""
