"""The verb sweep: candidates, their scores, the search and its journal."""
