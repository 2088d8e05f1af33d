"""What train.py stands on: a trainer, how it starts, what it shows, its checkpoints."""
