"""Figures: one function draws each, from a table; one registry computes, saves, redraws and checks them all.

A figure is a pair of functions. ``compute(study)`` makes the table, ``draw(table)`` makes a matplotlib Figure of it
and of nothing else, so that a figure can be redrawn from the CSV that lies beside it. Notebooks and sliders call the
same ``draw`` functions.

    from bhlib import figures
    figures.draw_stepup(figures.compute_stepup())

Every module in this folder is imported here, so that the figures in it are registered, and the names in its
``__all__`` are names of the package: a new figure is a new file, and nothing else.
"""

from importlib import import_module
from pkgutil import iter_modules

for _found in iter_modules(__path__):
    _module = import_module(f"{__name__}.{_found.name}")
    globals().update({name: getattr(_module, name) for name in getattr(_module, "__all__", ())})
