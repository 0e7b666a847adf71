"""Configurations of mergekit, translated into recipes."""
