"""What makes a run a run: settings, the loop, checkpoints, the run folder, processes. Nothing here
is a method."""
