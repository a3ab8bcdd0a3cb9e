"""What runs on the nodes: one process a GPU, started by torchrun. Needs torch."""
