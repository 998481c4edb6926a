"""Links: the job streams between two peers, which coordinators and stages share."""
