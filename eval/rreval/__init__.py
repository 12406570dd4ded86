"""Video-MME: run a checkpoint over it, full or sparse, and report figures that can be compared."""
