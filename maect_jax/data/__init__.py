"""From images on disk to global batches of views."""
