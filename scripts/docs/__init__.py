"""Generated parts of the pages: ``python -m scripts.docs`` writes them, ``--check`` compares them.

A page holds a part between ``<!-- generated: NAME -->`` and ``<!-- end -->``.  The functions that
make the parts are in :mod:`scripts.docs.parts`; the list of errors is in ``errors/``.
"""
