"""Tests of the documents: what is generated is up to date, what they name exists, and no page is missing."""
