"""The loop, and what makes it trustworthy: checkpoints, the proof of use, the record of a run."""
