"""Builds csrc/ and nothing else; everything about the package stands in pyproject.toml."""

from setuptools import setup

setup()
