"""``moshi-ttt generate``: recordings in, what Moshi answers out."""
