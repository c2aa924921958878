"""Tests. They import RecBole's modules in alphabetical order, before this package, which has to come first."""

import recbole_cce  # noqa: F401
