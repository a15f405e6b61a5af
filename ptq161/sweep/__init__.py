"""Many runs: the jobs of a sweep, their launcher and processes, failures and the summary."""
