"""Stages: the server half of a job. Stage server, spans and their sessions, scheduler, speculation, block placement."""
