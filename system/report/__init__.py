"""The one report writer: what every command, and the study, leaves in its folder.

``writer`` writes ``metrics.json`` and ``report.md``, ``tables`` makes the markdown and formats numbers and intervals,
``figures`` has the palette and the style of every figure, and ``inner_losses`` draws the inner losses of a block.
"""
