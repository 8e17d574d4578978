"""The steps of a config, compiled ahead of time for a TPU slice."""
