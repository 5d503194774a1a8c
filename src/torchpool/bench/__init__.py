"""How fast, against what: side by side with other libraries, every result checked before it is
timed."""
