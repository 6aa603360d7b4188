"""Offline training of predictors, thresholds and stand-ins."""
