"""What the notebooks are made with: they teach, this computes and checks."""
