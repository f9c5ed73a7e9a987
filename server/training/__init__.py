"""Heads that a running server trains: what to train, the work of one job, and the jobs of a server.

Enter at `jobs.HeadJobs`.
"""
