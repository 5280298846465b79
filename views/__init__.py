"""What a person sees of a run: an estimate before it, plots and tables after it."""
