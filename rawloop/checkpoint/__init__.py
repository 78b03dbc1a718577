"""Checkpoints that are whole or not there: `CheckpointManager` (in `manager.py`) and what belongs to it."""
