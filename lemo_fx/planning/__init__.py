"""Deciding what becomes of each module of a model, and proving each decision by running it. Changes nothing."""
