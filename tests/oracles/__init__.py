"""Tests beside libraries of `make setup-oracles`; `make nightly PARTS=oracles`."""
