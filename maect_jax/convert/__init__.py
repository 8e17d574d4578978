"""In and out of the PyTorch world: its files become runs, and runs its files."""
