"""The figures of a run, one file each, under the name that ``--what`` takes; nothing else has to know of a new one.

A figure is a module with

- ``lacks(run)``: why there is nothing to draw, as a sentence; None where there is;
- ``page(run, figure)``: draws the whole page and returns the numbers in it, a
  :class:`~gradprobe.plots.panels.PanelTable`, or one for each panel by its name.
"""
