"""The demo: a small shop, see app.py."""
