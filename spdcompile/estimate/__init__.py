"""Latencies of programs that need not be run: counted work, and tables of machines and links."""
