"""Judging tuners on workloads that they never saw, beside searches that know no other workload."""
