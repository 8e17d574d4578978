"""The training stages: what is fixed, the first state, the loss, the update."""
