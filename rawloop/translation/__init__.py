"""What other programs call a setting, and which keys it is here: their tables, their files, and how values translate.

Needs no torch. A table is a row for each setting (`rules.py`); `sources.py` reads files; `flags.py` a command line.
"""
