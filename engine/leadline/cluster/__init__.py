"""Runs on Ray: units, actors, scheduling, progress, plans. The only room that imports ray."""
