"""Graph passes over a captured decoder layer, one file each; `pipeline.PASSES` is their order."""
