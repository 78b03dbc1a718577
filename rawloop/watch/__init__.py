"""Watches training in anybody's loop and says what goes wrong: where, since when, whose fault, and what to do."""
