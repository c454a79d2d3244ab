"""What the engine did, drawn: views read events and nothing else."""
