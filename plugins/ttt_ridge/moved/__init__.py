"""Modules of ``plugins.ttt_ridge`` under their earlier names, for one version.

The package finds its modules in this folder too. Remove the folder, and that line, with the next version.
"""
