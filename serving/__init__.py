"""Moshi for many callers at once, live and from recordings: each has a slot, and a memory of its own."""
