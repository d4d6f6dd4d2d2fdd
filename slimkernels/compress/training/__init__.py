"""The training loop of one process or many, what it calls meanwhile, and its checkpoints."""
