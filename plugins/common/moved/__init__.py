"""Modules that moved from ``plugins.common`` to ``plugins.hybrid``, under their earlier names, for one version.

``plugins.common`` finds its modules in this folder too. Remove the folder, and that line, with the next version.
"""
