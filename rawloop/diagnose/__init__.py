"""Checks before step 0: label census, loss verdict, causality probe."""
