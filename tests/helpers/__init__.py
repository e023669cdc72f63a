"""Shared by the tests: routers that certify in milliseconds, a Hub on loopback, odd inputs, closed forms."""
