"""The report writer of all commands and of the study.

``writer`` writes ``metrics.json`` and ``report.md``, ``tables`` makes the markdown and formats numbers and intervals,
``figures`` has the palette and the style of every figure, and ``inner_losses`` draws the inner losses of a block.
"""
