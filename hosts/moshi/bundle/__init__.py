"""The tiny Moshi that ships with the package, laid out like a hub repository (data only)."""
