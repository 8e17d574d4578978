"""Pictures of a run, and one self-contained page with all of them."""
