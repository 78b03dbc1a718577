"""Listening: what a model says, as files, and measures of it."""
