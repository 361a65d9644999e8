"""Worlds that run in processes of their own: a JVM, a browser, an interpreter in C. `pool` is the owner's side."""
